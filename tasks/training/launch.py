"""Finetune: start the trainer as a program of its own, follow it, and store the adapter and loss curve that it leaves.

A program of its own gives its memory back when it ends, can be several processes on several machines, and cannot take its
starter with it. Killed, together or in part, the same call goes on from the last checkpoint; with storage on S3, from an empty
work_dir too, on another machine.

Each process takes batch_size examples at once, so the number of processes changes what a step learns from: it is part of what
names a training. Which machines they run on is not.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tasks import folders, storage, watchdog
from tasks.artifact import Artifact, provenance, read_provenance, read_rows, write_folder, write_table
from tasks.config import Finetune, Launch
from tasks.errors import ConfigError, TrainingError
from tasks.logs import run_logger
from tasks.model import fetch_model, model_fingerprint
from tasks.training import checkpoints, curve
from tasks.training.card import card
from tasks.training.lineage import learned_questions, started_from
from tasks.training.loading import base_name
from tasks.training.messages import read
from tasks.training.spec import Spec, write_spec

OnProgress = Callable[[int, int, float], None]
OnLine = Callable[[str], None]
NOT_LEARNED = {"save_steps"}  # settings that change nothing that is learned: a training goes on under other ones
_LAST_LINES = 25
_HANDED_OVER_S = 900.0


def world_size(settings: Launch) -> int:
    """Training processes on all machines together."""
    return (settings.processes_per_node or max(1, _gpus())) * settings.nodes


def _gpus() -> int:
    """GPUs that programs started here may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def finetune(
    training_set: Artifact,
    model: str,
    settings: Finetune,
    uri: str,
    work_dir: Path,
    on_progress: OnProgress,
    *,
    processes: Launch = Launch(),  # noqa: B008 - it cannot be changed
    trusted: Collection[str] = (),
    on_line: OnLine = lambda line: None,
    start: Artifact | None = None,
    images_root: str = "",
) -> tuple[Artifact, Artifact]:
    """Train a LoRA adapter.

    Args:
        training_set: of the schema that the method learns from: sft, dpo or reward.
        model: local folder or model hub name of the base model.
        uri: folder to write adapter/ and loss_curve.parquet to. On S3 it also takes the checkpoints, while training lasts.
        work_dir: local folder for checkpoints; the same one lets a killed training go on.
        on_progress: told (step, steps in all, loss).
        processes: how many processes train, and where they meet. On each of several machines the same call is made.
        trusted: names of models whose own code may run.
        on_line: told every line that the trainer and its libraries print, which begins with "[rank N] " where there are several.
        start: adapter/1 to go on from, and dpo's reference; the base model when None.
        images_root: storage root that page images lie below, where the training set shows any.

    Returns:
        what was trained (adapter/1, or reward-model/1 by method reward; both in PEFT's layout), and its loss curve
        (loss_curve/2). Their provenance says examples, set_aside by reason, steps, tokens, learned_tokens, computed_tokens,
        real_share (of the computed tokens, those that are no padding), and `measured`, by name.

    Raises:
        TrainingError: there is nothing to learn from, or training failed; the message names the process among several, its
            own error and its last words.
        ConfigError: machines are to train together that share no storage, or do not know where to meet; the training set is not
            one that the method learns from; `start` was trained on another model.
    """
    base = fetch_model(model, trusted)
    base_fingerprint = model_fingerprint(base)
    if training_set.schema.split("/")[0] != settings.method:
        raise ConfigError(
            f"method {settings.method} does not learn from a training set of schema {training_set.schema}"
        )
    if start and read_provenance(start)["base_fingerprint"] != base_fingerprint:
        raise ConfigError(f"adapter {start.uri} was trained on another model than {model}: start from the base model")
    world = world_size(processes)
    identity = [training_set.sha256, base_fingerprint, settings.model_dump(mode="json", exclude=NOT_LEARNED), world]
    identity += [start and start.sha256]
    spec = Spec(
        training=hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
        training_set=training_set,
        model=str(base),
        base_name=base_name(model),
        trust_remote_code=model in trusted,
        settings=settings,
        work_dir=work_dir,
        world_size=world,
        checkpoints_uri=storage.join(uri, "checkpoints") if storage.is_s3(uri) else None,
        images_root=images_root,
        start=start,
    )
    folders.make(work_dir)
    if spec.checkpoints_uri:
        checkpoints.fetch(spec.checkpoints_uri, work_dir / "checkpoints", spec.training)
    write_spec(spec, work_dir / "spec.json")
    (work_dir / "history.json").unlink(missing_ok=True)
    outcome = storage.join(uri, "outcome.json")
    if processes.nodes > 1:
        storage.delete(outcome)
    run(_command(work_dir / "spec.json", world, processes, uri), on_progress, on_line)
    if not (work_dir / "history.json").exists():  # the first process ran on another machine, which stores what it left
        return _handed_over(outcome)

    left = json.loads((work_dir / "history.json").read_text())
    table = curve.curve_table(left["history"])
    summary = curve.summary(table)
    written = read_provenance(training_set)
    of_sft = settings.method == "sft"
    rows = read_rows(training_set, ["prompt_fingerprint", "question_id", "split", *(["format"] if of_sft else [])])
    learned = {row["question_id"] for row in rows if row["split"] == "train"}
    made_of = provenance(
        {"training_set": training_set} | ({"start": start} if start else {}),
        learned_from=written["inputs"],
        settings=settings.model_dump(mode="json"),
        base_model=spec.base_name,
        base_fingerprint=base_fingerprint,
        world_size=world,
        prompt_fingerprints=sorted({row["prompt_fingerprint"] for row in rows} - {None}),  # imported ones may not say
        conversed_as=_conversed_as(training_set, written),
        measured=summary["measured"],
        questions=len(learned),
        learned_questions=learned_questions(learned, start, base),
        started_from=started_from(start),
        **left["facts"],
    )
    data = {
        "formats": sorted({row.get("format", settings.method) for row in rows}),
        "provenance": written,
    }
    (work_dir / "adapter" / "README.md").write_text(card(made_of, data, summary), encoding="utf-8")
    kind = "reward-model/1" if settings.method == "reward" else "adapter/1"
    adapter = write_folder(work_dir / "adapter", storage.join(uri, "adapter"), kind, 1, made_of)
    loss_curve = write_table(table, storage.join(uri, "loss_curve.parquet"), "loss_curve/2", made_of)
    if processes.nodes > 1:
        made = {"adapter": asdict(adapter), "loss_curve": asdict(loss_curve)}
        storage.write_bytes(outcome, json.dumps(made).encode())
    return adapter, loss_curve


def _conversed_as(training_set: Artifact, written: Mapping[str, Any]) -> dict[str, Any] | None:
    """Settings of the agent whose conversations are learned from; None where no more is shown than a question."""
    learned = {"sft": "completion", "dpo": "chosen"}.get(training_set.schema.split("/")[0])
    if learned is None or "prompt_messages" not in written:
        return None
    asked = written["prompt_messages"]
    rows = read_rows(training_set, ["prompt", learned])
    return written["agent"] if any(len(row["prompt"]) > asked or len(row[learned]) > 1 for row in rows) else None


def forget_checkpoints(uri: str, work_dir: Path) -> None:
    """Delete what let a training go on. Call it once what was learned can be found: until then a kill would cost all of it.

    Args:
        uri, work_dir: as `finetune` had them.
    """
    shutil.rmtree(work_dir, ignore_errors=True)  # also a copy of what was learned, and each process's log
    storage.delete(storage.join(uri, "checkpoints"))


def _command(spec: Path, world: int, processes: Launch, uri: str) -> list[str]:
    """The program that trains: the trainer itself, or what starts several of it.

    Raises:
        ConfigError: machines are to train together that share no storage, or do not know where to meet.
    """
    if world == 1:
        return [sys.executable, "-m", "tasks.training.train", "--spec", str(spec)]
    command = [sys.executable, "-m", "tasks.training.ranks", "--spec", str(spec)]
    command += ["--processes", str(world // processes.nodes)]
    if processes.nodes > 1:
        rendezvous = processes.rendezvous or os.environ.get("PET_RDZV_ENDPOINT")
        if not rendezvous:
            raise ConfigError("several machines need a place to meet: set rendezvous (HOST:PORT on one of them)")
        if not storage.is_s3(uri):
            raise ConfigError(
                "several machines hand checkpoints and adapter over on S3: set storage to s3://bucket/prefix"
            )
        command += ["--nodes", str(processes.nodes), "--rendezvous", rendezvous]
    return command


def _handed_over(uri: str) -> tuple[Artifact, Artifact]:
    """What another machine stored, as soon as it has."""
    deadline = time.monotonic() + _HANDED_OVER_S
    while not storage.exists(uri):
        if time.monotonic() > deadline:
            raise TrainingError(
                f"training ended, but the machine of its first process did not store the adapter ({uri}): see that one's log"
            )
        time.sleep(1)
    made = json.loads(storage.read_bytes(uri))
    return Artifact(**made["adapter"]), Artifact(**made["loss_curve"])


def run(command: list[str], on_progress: OnProgress, on_line: OnLine) -> None:
    """Run a trainer to its end, passing on its progress, warnings and lines; it does not outlive its starter.

    Raises:
        TrainingError: it ended with an error, which the message quotes.
    """
    process = watchdog.start(
        command, env=_environment(several="tasks.training.ranks" in command), output=subprocess.PIPE
    )
    last: defaultdict[int | None, deque[str]] = defaultdict(lambda: deque(maxlen=_LAST_LINES))
    mendable: str | None = None
    failed: dict[str, Any] | None = None
    try:
        assert process.stdout is not None
        for line in process.stdout:
            raw = line.decode(errors="replace").rstrip()
            rank, text, message = read(raw)
            if message is None:
                last[rank].append(text)
                on_line(raw)
            elif "rank" in message:
                failed = message
            elif "warning" in message:
                run_logger().warning("%s", message["warning"])
            elif "error" in message:
                mendable = mendable or message["error"]
            else:
                on_progress(message["step"], message["total"], message["loss"])
    finally:
        code = watchdog.stop(process)
    if not code:
        return
    if mendable:
        raise TrainingError(mendable)
    if failed:
        first = f"rank {failed['rank']} of {failed['world']}: {failed['error']}"
        raise TrainingError("\n".join([first, *last[failed["rank"]]]))
    raise TrainingError("\n".join([f"the trainer ended with code {code}:", *last[None]]))


def _environment(several: bool) -> dict[str, str]:
    """One process takes one GPU, several take them all; lines come at once; nothing is reported home."""
    env = dict(os.environ)
    if not several:
        env["CUDA_VISIBLE_DEVICES"] = env.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    env |= {"HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false"}
    env |= {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1"}  # a checkpoint comes from storage: what it holds is read, never run
    return env | {"PYTHONUNBUFFERED": "1"}
