"""Finetune: start the trainer as a process of its own, follow it, and store the adapter and loss curve that it leaves.

A process of its own gives its memory back when it ends, can be started by torchrun instead, and cannot take its starter
with it. Killed, together or alone, the same call goes on from the last checkpoint.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tasks import storage, watchdog
from tasks.artifact import Artifact, provenance, read_provenance, read_rows, write_folder, write_table
from tasks.config import Finetune
from tasks.errors import TrainingError
from tasks.model import fetch_model, model_fingerprint
from tasks.training import checkpoints, curve
from tasks.training.loading import base_name
from tasks.training.spec import Spec, write_spec

OnProgress = Callable[[int, int, float], None]
_LAST_LINES = 25


def finetune(
    training_set: Artifact, model: str, settings: Finetune, uri: str, work_dir: Path, on_progress: OnProgress
) -> tuple[Artifact, Artifact, dict[str, Any]]:
    """Train a LoRA adapter.

    Args:
        training_set: sft/1.
        model: local folder or model hub name of the base model.
        uri: folder to write adapter/ and loss_curve.parquet to. On S3 it also takes the checkpoints, while training lasts.
        work_dir: local folder for checkpoints; the same one lets a killed training go on.
        on_progress: told (step, steps in all, loss).

    Returns:
        the adapter (adapter/1, in PEFT's layout), its loss curve (loss_curve/1), and facts: examples, set_aside by reason,
        steps, tokens, learned_tokens, computed_tokens, real_share (of the computed tokens, those that are no padding),
        seconds, tokens_per_second, loss, eval_loss.

    Raises:
        TrainingError: there is nothing to learn from, or training failed; the message has the trainer's last words.
    """
    base = fetch_model(model)
    base_fingerprint = model_fingerprint(base)
    prompts = sorted({row["prompt_fingerprint"] for row in read_rows(training_set, ["prompt_fingerprint"])})
    identity = [training_set.sha256, base_fingerprint, settings.model_dump(mode="json")]
    spec = Spec(
        training=hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
        training_set=training_set,
        model=str(base),
        base_name=base_name(model),
        settings=settings,
        work_dir=work_dir,
        checkpoints_uri=storage.join(uri, "checkpoints") if storage.is_s3(uri) else None,
    )
    work_dir.mkdir(parents=True, exist_ok=True)
    if spec.checkpoints_uri:
        checkpoints.fetch(spec.checkpoints_uri, work_dir / "checkpoints", spec.training)
    write_spec(spec, work_dir / "spec.json")
    run([sys.executable, "-m", "tasks.training.sft", "--spec", str(work_dir / "spec.json")], on_progress)

    left = json.loads((work_dir / "history.json").read_text())
    made_of = provenance(
        {"training_set": training_set},
        learned_from=read_provenance(training_set)["inputs"],
        settings=settings.model_dump(mode="json"),
        base_model=spec.base_name,
        base_fingerprint=base_fingerprint,
        prompt_fingerprints=prompts,
        **left["facts"],
    )
    adapter = write_folder(work_dir / "adapter", storage.join(uri, "adapter"), "adapter/1", 1, made_of)
    table = curve.curve_table(left["history"])
    loss_curve = write_table(table, storage.join(uri, "loss_curve.parquet"), "loss_curve/1", made_of)
    shutil.rmtree(work_dir / "checkpoints")
    if spec.checkpoints_uri:
        storage.delete(spec.checkpoints_uri)
    return adapter, loss_curve, left["facts"] | curve.summary(table)


def run(command: list[str], on_progress: OnProgress) -> None:
    """Run a trainer to its end, passing on its progress; it does not outlive its starter.

    Raises:
        TrainingError: it ended with an error, which the message quotes.
    """
    process = watchdog.start(command, env=_environment(), output=subprocess.PIPE)
    last: deque[str] = deque(maxlen=_LAST_LINES)
    said = None
    try:
        assert process.stdout is not None
        for line in process.stdout:
            text = line.decode(errors="replace").rstrip()
            message = _message(text)
            if message is None:
                last.append(text)
            elif "error" in message:
                said = message["error"]
            else:
                on_progress(message["step"], message["total"], message["loss"])
    finally:
        code = watchdog.stop(process)
    if code:
        raise TrainingError(said or f"the trainer ended with code {code}:\n" + "\n".join(last))


def _message(line: str) -> dict[str, Any] | None:
    """What the trainer tells its starter; None when the line is some library's."""
    if not line.startswith("{"):
        return None
    try:
        message = json.loads(line)
    except json.JSONDecodeError:
        return None
    return message if "error" in message or {"step", "total", "loss"} <= message.keys() else None


def _environment() -> dict[str, str]:
    """One process takes one GPU; several are for torchrun. Nothing is reported home."""
    env = dict(os.environ)
    env["CUDA_VISIBLE_DEVICES"] = env.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return env | {"HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false"}
