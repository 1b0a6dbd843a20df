"""Finetuning as a whole: killed, it goes on to the same adapter; what goes wrong is said."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks import storage
from tasks.artifact import (
    Artifact,
    fetch_folder,
    provenance,
    read_provenance,
    read_rows,
    table_of,
    write_table,
)
from tasks.config import Finetune
from tasks.errors import TrainingError
from tasks.training import launch, messages, train
from tests.tasks.training import training_rows

SETTINGS = Finetune(epochs=4, batch_size=5, gradient_accumulation=2, save_steps=3, lora_dropout=0.1, batching="packing")
STEPS = 14

# The same call in a process of its own, which a test can kill.
STARTER = """
import json, sys
from pathlib import Path
from tasks.artifact import Artifact
from tasks.config import Finetune
from tasks.training import launch
training_set, model, settings, uri, work_dir = json.loads(sys.argv[1])
def on_progress(*told):
    print(*told, flush=True)
launch.finetune(Artifact(**training_set), model, Finetune(**settings), uri, Path(work_dir), on_progress)
"""


def weights(adapter: Artifact) -> bytes:
    return (fetch_folder(adapter) / "adapter_model.safetensors").read_bytes()


def follow(steps: list[int]) -> launch.OnProgress:
    def on_progress(step: int, total: int, loss: float) -> None:
        assert total == STEPS
        assert loss > 0
        steps.append(step)

    return on_progress


@pytest.fixture(scope="module")
def whole(training_set: Artifact, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A training that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    steps: list[int] = []
    made = launch.finetune(training_set, str(model), SETTINGS, str(folder / "out"), folder / "work", follow(steps))
    assert steps == list(range(1, STEPS + 1))
    return made


def test_what_is_made(whole: tuple[Artifact, Artifact], training_set: Artifact) -> None:
    adapter, curve = whole
    assert (adapter.schema, curve.schema, curve.rows) == ("adapter/1", "loss_curve/2", STEPS)
    rows = read_rows(curve)
    assert [r["step"] for r in rows] == list(range(1, STEPS + 1))
    assert rows[-1]["epoch"] == 4
    assert [r["step"] for r in rows if r["eval_loss"]] == [4, 7, 10, 14]
    assert rows[-1]["loss"] < rows[0]["loss"]
    made_of = read_provenance(adapter)
    assert rows[-1]["tokens"] == made_of["tokens"] > made_of["computed_tokens"]
    assert made_of["real_share"] >= 0.9
    assert (made_of["examples"], made_of["measured_on"], made_of["set_aside"]) == (35, 7, {})
    assert made_of["prompt_fingerprints"] == ["prompt"]
    learned = {row["question_id"] for row in read_rows(training_set) if row["split"] == "train"}
    assert (made_of["learned_questions"], made_of["questions"]) == (sorted(learned), len(learned))
    assert made_of["inputs"] == {"training_set": training_set.sha256}
    assert {p.name for p in fetch_folder(adapter).iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "provenance.json",
    }


@pytest.mark.parametrize("storage_root", ["local", "seaweedfs"], indirect=True)  # long: on one S3 server
def test_killed_it_goes_on_to_the_same_adapter(
    whole: tuple[Artifact, Artifact],
    training_set: Artifact,
    model: Path,
    storage_root: str,
    tmp_path: Path,
) -> None:
    uri = storage.join(storage_root, "adapters")
    call = [asdict(training_set), str(model), SETTINGS.model_dump(), uri, str(tmp_path / "work")]
    starter = subprocess.Popen([sys.executable, "-c", STARTER, json.dumps(call)], stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    for line in starter.stdout:
        if line.startswith("8 "):
            os.kill(starter.pid, signal.SIGKILL)
    starter.wait()
    assert starter.returncode == -signal.SIGKILL

    work = tmp_path / ("work" if not storage.is_s3(uri) else "work of another machine")
    steps: list[int] = []
    oftener = SETTINGS.model_copy(update={"save_steps": 2})
    adapter, _ = launch.finetune(training_set, str(model), oftener, uri, work, follow(steps))
    assert 6 < steps[0] <= 13, "it began again from the start"
    assert steps == list(range(steps[0], STEPS + 1))
    assert weights(adapter) == weights(whole[0])

    # killed before anything knows that it is done: what was learned is not learned again
    again: list[int] = []
    adapter, curve = launch.finetune(training_set, str(model), SETTINGS, uri, work, follow(again))
    assert again == []
    assert adapter.sha256 == whole[0].sha256
    losses = [(r["step"], r["loss"], r["eval_loss"], r["tokens"]) for r in read_rows(curve)]
    assert losses == [(r["step"], r["loss"], r["eval_loss"], r["tokens"]) for r in read_rows(whole[1])]
    launch.forget_checkpoints(uri, work)
    assert not work.exists()
    assert not [file for file in storage.iter_files(uri) if "/checkpoints/" in file]


def test_an_imported_training_set_need_not_say_which_prompt_it_was_made_with(model: Path, tmp_path: Path) -> None:
    rows = [training_rows.row("How long?", "<search>pump</search>", prompt_fingerprint=None)]
    training_set = write_table(table_of(rows, "sft/2"), str(tmp_path / "sft.parquet"), "sft/2", provenance())
    once, steps = SETTINGS.model_copy(update={"epochs": 1}), list[int]()
    adapter, _ = launch.finetune(
        training_set, str(model), once, str(tmp_path / "out"), tmp_path / "work", lambda step, *_: steps.append(step)
    )
    assert read_provenance(adapter)["prompt_fingerprints"] == []
    assert "of a prompt that is not known" in (fetch_folder(adapter) / "README.md").read_text()


def test_the_trainer_s_last_words_are_in_the_error(tmp_path: Path) -> None:
    crash = "print('loading'); print('{\"error\": \"of a library\"}'); "
    crash += (
        "from tasks.training import messages; messages.tell(step=1, total=2, loss=3.0); raise MemoryError('no room')"
    )
    seen: list[tuple[int, int, float]] = []
    lines: list[str] = []
    with pytest.raises(TrainingError, match=r"(?s)code 1.*loading.*MemoryError: no room"):
        launch.run([sys.executable, "-c", crash], lambda *told: seen.append(told), lines.append)
    assert seen == [(1, 2, 3.0)]
    assert lines[0] == "loading"
    assert lines[-1] == "MemoryError: no room"


def test_what_the_trainer_warns_of_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    warn = "from tasks.training import messages; messages.tell(warning='this will take long')"
    launch.run([sys.executable, "-c", warn], lambda *_: None, lambda _: None)
    assert [(r.levelname, r.message) for r in caplog.records] == [("WARNING", "this will take long")]


def test_a_gpu_that_pytorch_does_not_see_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "DRIVER", tmp_path / "nvidiactl")
    train.warn_of_an_unused_gpu()
    assert capsys.readouterr().out == ""
    train.DRIVER.touch()
    train.warn_of_an_unused_gpu()
    told = messages.read(capsys.readouterr().out.strip()).message
    assert (told is None) == torch.cuda.is_available()
    assert told is None or "sees no GPU" in told["warning"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    train.warn_of_an_unused_gpu()  # meant so
    if not torch.cuda.is_available():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
        with pytest.raises(TrainingError, match=r"CUDA_VISIBLE_DEVICES names \(7\)"):
            train.warn_of_an_unused_gpu()


def test_an_error_that_the_user_can_mend_comes_without_the_log() -> None:
    refuse = "from tasks.training import messages; print('loading'); messages.tell(error='collect more'); raise SystemExit(6)"
    with pytest.raises(TrainingError, match=r"\Acollect more\Z"):
        launch.run([sys.executable, "-c", refuse], lambda *_: None, lambda _: None)
