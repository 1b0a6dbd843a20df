"""demo: the whole loop on documents that the project makes itself, with a small real model.

make demo
"""

from pathlib import Path

from flows.improve import improve
from tasks import config
from tasks.errors import ConfigError
from tasks.sample import sample_in, write_sample
from tasks.stages import StageRun


def demo(settings: config.Improve) -> list[StageRun]:
    """Write the sample where the settings look for documents, and go round the loop.

    Raises:
        ConfigError: the settings name documents of one's own, which would be written over.
    """
    given = settings.ingest
    folder = Path(given.documents or "").parent
    sample = sample_in(folder)
    if given.ocr_file or (given.documents, given.questions) != (str(sample.documents), str(sample.questions)):
        raise ConfigError(
            "the demo makes its own documents and questions; for yours: drag improve --config deployments/recipes/demo.yaml "
            "--documents FOLDER --questions FILE"
        )
    write_sample(folder)
    return improve(settings)
