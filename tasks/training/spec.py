"""What the trainer is told: the JSON file between tasks/training/launch.py and tasks/training/train.py."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tasks.artifact import Artifact
from tasks.config import Finetune


@dataclass(frozen=True)
class Spec:
    """One training.

    Attributes:
        training: a hash of all that decides its result: checkpoints carry it.
        training_set: of the schema that the method learns from.
        model: folder of the base model.
        base_name: how the adapter names its base.
        trust_remote_code: whether code that the base model brings may run.
        work_dir: local folder for checkpoints and what is made.
        world_size: processes that train together.
        checkpoints_uri: s3:// folder where other machines find checkpoints, if there is one.
        start: adapter/1 that is gone on from; the base model when None.
        images_root: storage root that page images lie below.
    """

    training: str
    training_set: Artifact
    model: str
    base_name: str
    trust_remote_code: bool
    settings: Finetune
    work_dir: Path
    world_size: int
    checkpoints_uri: str | None
    start: Artifact | None = None
    images_root: str = ""


def write_spec(spec: Spec, file: Path) -> None:
    """Write a spec as JSON."""
    content: dict[str, Any] = {
        name: getattr(spec, name)
        for name in (
            "training",
            "model",
            "base_name",
            "trust_remote_code",
            "world_size",
            "checkpoints_uri",
            "images_root",
        )
    }
    content |= {
        "training_set": asdict(spec.training_set),
        "start": spec.start and asdict(spec.start),
        "settings": spec.settings.model_dump(mode="json"),
        "work_dir": str(spec.work_dir.absolute()),
    }
    file.write_text(json.dumps(content, indent=1))


def read_spec(file: Path) -> Spec:
    """Read what `write_spec` wrote."""
    content = json.loads(file.read_text())
    made = {
        "training_set": Artifact(**content["training_set"]),
        "start": content["start"] and Artifact(**content["start"]),
        "settings": Finetune(**content["settings"]),
        "work_dir": Path(content["work_dir"]),
    }
    return Spec(**(content | made))
