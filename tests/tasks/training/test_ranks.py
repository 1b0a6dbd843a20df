"""Several processes: what one of them says of its own failure is what is reported, and training goes on where it was."""

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from tasks import storage
from tasks.artifact import Artifact, fetch_folder, read_provenance, read_rows
from tasks.config import Finetune, Launch
from tasks.errors import ConfigError, TrainingError
from tasks.network import free_port
from tasks.training import launch
from tasks.training.ranks import root_cause
from tests.listening import listening
from tests.tasks.training.several import FAILS, SHARDS_ON_A_CPU, inject, process_of

SETTINGS = Finetune(epochs=2, batch_size=3, save_steps=3, lora_dropout=0.1)
STEPS = 12  # 12 batches an epoch, two processes
TWO = Launch(processes_per_node=2)


class Followed:
    """What a training says of itself."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.lines: list[str] = []
        self.listening: dict[int, str] = {}

    def on_progress(self, step: int, total: int, loss: float) -> None:
        assert total == STEPS
        self.steps.append(step)
        self.listening = self.listening or listening("python")


def losses(curve: Artifact) -> list[tuple[Any, ...]]:
    return [(row["step"], row["loss"], row["eval_loss"], row["tokens"]) for row in read_rows(curve)]


@pytest.fixture(scope="module")
def whole(training_set: Artifact, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A training by two processes that nothing interrupts."""
    folder, seen = tmp_path_factory.mktemp("whole"), Followed()
    made = launch.finetune(
        training_set,
        str(model),
        SETTINGS,
        str(folder / "out"),
        folder / "work",
        seen.on_progress,
        processes=TWO,
        on_line=seen.lines.append,
    )
    assert seen.steps == list(range(1, STEPS + 1))
    assert {"[rank 0] process 1 of 2 on cpu:0", "[rank 1] process 2 of 2 on cpu:0"} <= set(seen.lines)
    return made, seen


def test_processes_of_one_machine_are_reached_by_no_other(whole: Any) -> None:
    found = whole[1].listening
    assert len(found) > 2, "this process's servers, torchrun's, and each training process's"
    assert set(found.values()) == {"127.0.0.1"}


def test_what_is_made_tells_how_many_made_it(whole: Any) -> None:
    (adapter, _), _ = whole
    made_of = read_provenance(adapter)
    assert (made_of["world_size"], made_of["steps"]) == (2, STEPS)
    card = (fetch_folder(adapter) / "README.md").read_text()
    assert "| Processes | 2 |" in card
    assert "A step learned from 6 examples" in card


def test_a_killed_process_is_named_and_another_machine_goes_on_to_the_same_adapter(
    whole: Any, training_set: Artifact, model: Path, s3_root: str, tmp_path: Path
) -> None:
    uri, before, after = storage.join(s3_root, "adapters"), Followed(), Followed()

    def kill_one(step: int, total: int, loss: float) -> None:
        before.on_progress(step, total, loss)
        if step == 7:
            os.kill(process_of(1), signal.SIGKILL)

    called = (training_set, str(model), SETTINGS, uri)
    with pytest.raises(TrainingError, match=r"\Arank 1 of 2: killed by SIGKILL"):
        launch.finetune(*called, tmp_path / "here", kill_one, processes=TWO)
    saved = {storage.relative(file, uri).split("/")[1] for file in storage.iter_files(uri)}
    assert saved == {"checkpoint-6"} or "checkpoint-9" in saved

    adapter, curve = launch.finetune(*called, tmp_path / "there", after.on_progress, processes=TWO)
    assert before.steps == list(range(1, before.steps[-1] + 1))
    assert after.steps == list(range(after.steps[0], STEPS + 1))
    assert 0 <= before.steps[-1] + 1 - after.steps[0] <= SETTINGS.save_steps
    assert adapter.sha256 == whole[0][0].sha256
    assert losses(curve) == losses(whole[0][1])


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("MemoryError('no room')", r"\Arank 1 of 2: MemoryError: no room\n(?s:.*)lay_out"),
        ("TrainingError('collect more')", r"\Acollect more\Z"),
    ],
)
def test_a_failed_process_is_reported_in_its_own_words(
    error: str, said: str, training_set: Artifact, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inject(FAILS.format(error=error), tmp_path / "fault", monkeypatch)
    seen = Followed()
    with pytest.raises(TrainingError, match=said):
        launch.finetune(
            training_set,
            str(model),
            SETTINGS,
            str(tmp_path / "out"),
            tmp_path / "work",
            seen.on_progress,
            processes=TWO,
            on_line=seen.lines.append,
        )
    assert seen.steps
    assert any(line.startswith("[rank 1] ") and "MemoryError: no room" in line for line in seen.lines) == (
        "Memory" in error
    )


def test_the_root_cause_is_no_echo(tmp_path: Path) -> None:
    now = int(time.time())

    def failure(rank: int, code: int, said: str | None, at: int) -> ProcessFailure:
        file = tmp_path / f"{rank}.json"
        if said:
            content = {"message": said, "extraInfo": {"py_callstack": "", "timestamp": str(at)}}
            file.write_text(json.dumps({"message": content}))
        return ProcessFailure(local_rank=rank, pid=rank, exitcode=code, error_file=str(file))

    echo = failure(0, 1, "RuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by peer", now - 60)
    late = failure(1, 1, "RuntimeError: CUDA out of memory", now - 20)
    early = failure(2, 1, "ValueError: a bad row", now - 40)
    killed = failure(3, -9, None, now)
    silent = failure(4, 3, None, now)
    ended = failure(5, -15, None, now - 70)
    assert root_cause({0: echo}) == (0, echo.message["message"])
    assert root_cause({0: echo, 1: late, 2: early}) == (2, "ValueError: a bad row")
    assert root_cause({0: echo, 5: ended, 3: killed}) == (3, "killed by SIGKILL")
    raised_then_ended = failure(6, -15, "KeyError: 'x'", now - 10)
    assert root_cause({0: echo, 5: ended, 6: raised_then_ended}) == (6, "KeyError: 'x'")
    assert root_cause({0: echo, 4: silent}) == (4, "ended with code 3")


def test_sharded_it_learns_the_same_and_goes_on_from_its_checkpoint(
    whole: Any, training_set: Artifact, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from safetensors.torch import load_file

    inject(SHARDS_ON_A_CPU, tmp_path / "fault", monkeypatch)
    sharded = SETTINGS.model_copy(update={"strategy": "fsdp", "recompute": "on"})
    called = (training_set, str(model), sharded, str(tmp_path / "out"), tmp_path / "work")
    seen = Followed()

    def kill_one(step: int, total: int, loss: float) -> None:
        if step == 7:
            os.kill(process_of(0), signal.SIGKILL)

    with pytest.raises(TrainingError, match="rank 0 of 2: killed by SIGKILL"):
        launch.finetune(*called, kill_one, processes=TWO)
    assert list((tmp_path / "work" / "checkpoints").glob("checkpoint-*/pytorch_model_fsdp.bin"))
    adapter, curve = launch.finetune(*called, seen.on_progress, processes=TWO)
    assert seen.steps[0] in (7, 10)
    found, expected = (load_file(fetch_folder(made) / "adapter_model.safetensors") for made in (adapter, whole[0][0]))
    assert found.keys() == expected.keys()
    # Sharded gradients are averaged in bfloat16, which turns Adam's first steps in the few elements that have hardly any.
    apart = torch.cat([(found[name] - expected[name]).abs().flatten() for name in found])
    assert (apart > 1e-4).float().mean() < 0.02
    assert [row[0] for row in losses(curve)] == list(range(1, STEPS + 1))
    for one, other in zip(losses(curve), losses(whole[0][1]), strict=True):
        assert [value or 0 for value in one] == pytest.approx([value or 0 for value in other], rel=1e-3)


def test_sharded_without_gpus_is_refused_rather_than_left_undone(
    training_set: Artifact, model: Path, tmp_path: Path
) -> None:
    sharded = SETTINGS.model_copy(update={"strategy": "fsdp"})
    with pytest.raises(TrainingError, match=r"\Astrategy fsdp shards a model over GPUs, and here is none"):
        launch.finetune(
            training_set, str(model), sharded, str(tmp_path / "out"), tmp_path / "work", lambda *_: None, processes=TWO
        )


def test_two_machines_make_what_one_makes_with_as_many_processes(
    whole: Any, training_set: Artifact, model: Path, s3_root: str, tmp_path: Path
) -> None:
    uri, place = storage.join(s3_root, "adapters"), f"127.0.0.1:{free_port()}"
    made: dict[str, Any] = {}

    def machine(name: str) -> None:
        together = Launch(processes_per_node=1, nodes=2, rendezvous=place)
        made[name] = launch.finetune(
            training_set, str(model), SETTINGS, uri, tmp_path / name, lambda *_: None, processes=together
        )

    threads = [threading.Thread(target=machine, args=(name,)) for name in ("first", "second")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made["first"] == made["second"]
    assert made["first"][0].sha256 == whole[0][0].sha256
    assert losses(made["first"][1]) == losses(whole[0][1])


def test_machines_that_cannot_train_together_say_so(
    training_set: Artifact, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PET_RDZV_ENDPOINT", raising=False)
    called = (training_set, str(model), SETTINGS, str(tmp_path / "out"), tmp_path / "work", lambda *_: None)
    with pytest.raises(ConfigError, match="set rendezvous"):
        launch.finetune(*called, processes=Launch(nodes=2))
    with pytest.raises(ConfigError, match="on S3"):
        launch.finetune(*called, processes=Launch(nodes=2, rendezvous="127.0.0.1:1"))


def test_one_process_for_each_gpu_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for visible, count in (("0,1,2", 3), ("", 1), ("-1", 1), ("GPU-5", 1)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert launch.world_size(Launch()) == count
        assert launch.world_size(Launch(nodes=2)) == 2 * count
    assert launch.world_size(Launch(processes_per_node=8, nodes=2)) == 16
