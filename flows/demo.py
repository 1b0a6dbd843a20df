"""demo: the whole loop on documents that the project makes itself, with a small real model.

make demo
"""

from pathlib import Path

from flows.improve import improve
from tasks import config
from tasks.sample import write_sample
from tasks.stages import StageRun


def demo(settings: config.Improve) -> list[StageRun]:
    """Write the sample where the settings look for documents, and go round the loop."""
    write_sample(Path(settings.ingest.documents).parent)
    return improve(settings)
