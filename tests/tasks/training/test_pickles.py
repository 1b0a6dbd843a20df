"""A checkpoint comes from a bucket that others may write to: a pickle in it is refused, and nothing in it runs."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks import storage
from tasks.artifact import Artifact
from tasks.config import Finetune
from tasks.errors import TrainingError
from tasks.training import checkpoints, launch
from tasks.training.spec import Spec, write_spec

SETTINGS = Finetune(epochs=2, batch_size=8, save_steps=2, lora_r=4, bf16=False)


class Attack:
    """An object whose pickle makes a folder when it is read."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


def train(training_set: Artifact, model: Path, work_dir: Path, uri: str) -> list[int]:
    """The trainer alone, which leaves its checkpoints; returns the steps that it took."""
    work_dir.mkdir(parents=True, exist_ok=True)
    checkpoints.fetch(uri, work_dir / "checkpoints", "training")
    spec = Spec("training", training_set, str(model), "tiny", False, SETTINGS, work_dir, 1, uri)
    write_spec(spec, work_dir / "spec.json")
    steps: list[int] = []
    program = [sys.executable, "-m", "tasks.training.train", "--spec", str(work_dir / "spec.json")]
    launch.run(program, lambda step, *_: steps.append(step), lambda line: None)
    return steps


def test_a_pickle_in_a_checkpoint_is_not_run(training_set: Artifact, model: Path, s3_root: str, tmp_path: Path) -> None:
    uri = storage.join(s3_root, "checkpoints")
    assert train(training_set, model, tmp_path / "one", uri)
    files = {storage.relative(file, uri): file for file in storage.iter_files(uri)}
    (folder,) = {name.split("/")[0] for name in files}
    pickles = [name for name in files if name.endswith((".pt", ".pth", ".bin"))]
    assert {name.split("/")[1] for name in pickles} >= {"optimizer.pt", "scheduler.pt", "rng_state.pth"}

    trace = tmp_path / "it-ran"
    evil = tmp_path / "evil"
    torch.save(Attack(trace), evil)
    for name in pickles:
        storage.write_bytes(files[name], evil.read_bytes())
    # whoever can write there can write the hashes too
    whole = tmp_path / "whole" / folder
    storage.download_folder(storage.join(uri, folder), whole)
    (whole / "complete.json").unlink()
    marker = json.loads(storage.read_bytes(files[f"{folder}/complete.json"]))
    storage.write_bytes(
        files[f"{folder}/complete.json"], json.dumps(marker | {"files": checkpoints._hashes(whole)}).encode()
    )
    with pytest.raises(TrainingError, match="Weights only load failed"):
        train(training_set, model, tmp_path / "two", uri)
    assert (tmp_path / "two" / "checkpoints" / folder / "optimizer.pt").read_bytes() == evil.read_bytes()
    assert not trace.exists()
    torch.load(evil, weights_only=False)
    assert trace.exists(), "the attack works where nothing is checked"
