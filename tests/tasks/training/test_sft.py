"""The trainer itself: its loss is the one that is documented, and a loss that is no number stops it."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from tasks.artifact import Artifact, read_rows, table_of, write_table
from tasks.config import Finetune
from tasks.errors import TrainingError
from tasks.training import sft
from tasks.training.loading import load_model, load_tokenizer
from tasks.training.spec import Spec, read_spec, write_spec
from tasks.training.train import main, train
from tasks.training.trainer import share_of_peak
from tests.tasks.training.recomputed import assert_recompute_changes_nothing
from tests.tasks.training.training_rows import row


@pytest.fixture
def spec(training_set: Artifact, model: Path, tmp_path: Path) -> Spec:
    return Spec("training", training_set, str(model), "tiny", False, Finetune(bf16=False, epochs=1), tmp_path, 1, None)


def test_spec_survives_its_file(spec: Spec) -> None:
    write_spec(spec, spec.work_dir / "spec.json")
    assert read_spec(spec.work_dir / "spec.json") == spec


@pytest.mark.parametrize("batching", ["length-grouped", "packing"])
def test_the_first_loss_is_the_mean_over_learned_tokens(spec: Spec, batching: str) -> None:
    import torch

    # one step over everything, so that order and layout cannot matter
    settings = spec.settings.model_copy(
        update={"batch_size": 7, "gradient_accumulation": 5, "batching": batching, "weight_scheme": "rank-score"}
    )
    train(replace(spec, settings=settings))
    history = json.loads((spec.work_dir / "history.json").read_text())["history"]

    network = load_model(spec.model, bf16=False)
    items = sft.load(read_rows(spec.training_set), load_tokenizer(spec.model), settings)
    total, count = 0.0, 0
    for (example,) in (item.examples for item in items.train):
        with torch.no_grad():
            logits = network(input_ids=torch.tensor([example.ids])).logits[0]
        for target in example.targets:
            total -= example.weight * torch.log_softmax(logits[target - 1], 0)[example.ids[target]].item()
            count += 1
    assert history[-2]["loss"] == pytest.approx(total / count, rel=1e-5)


def test_activations_that_are_computed_again_are_those_that_were_kept(
    spec: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_recompute_changes_nothing(spec, monkeypatch)


def test_what_a_kill_may_leave_behind_gives_the_same_adapter(spec: Spec) -> None:
    resumable = replace(spec, settings=spec.settings.model_copy(update={"save_steps": 2, "lora_dropout": 0.1}))
    adapter, checkpoints = spec.work_dir / "adapter" / "adapter_model.safetensors", spec.work_dir / "checkpoints"
    train(resumable)
    whole = adapter.read_bytes()
    assert {path.name for path in checkpoints.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-5"}
    # all steps are done, but nothing was stored
    adapter.unlink()
    train(resumable)
    assert adapter.read_bytes() == whole
    # the last checkpoint was cut off in writing
    (checkpoints / "checkpoint-5" / "complete.json").unlink()
    (checkpoints / "checkpoint-5" / "adapter_model.safetensors").write_bytes(b"half")
    adapter.unlink()
    train(resumable)
    assert adapter.read_bytes() == whole


def test_two_processes_learn_what_one_learns_from_twice_the_batches(spec: Spec) -> None:
    from safetensors.numpy import load_file

    one, two = spec.work_dir / "one", spec.work_dir / "two"
    for folder, processes in ((one, 1), (two, 2)):
        folder.mkdir()
        settings = spec.settings.model_copy(update={"batch_size": 3, "gradient_accumulation": 2 // processes})
        write_spec(replace(spec, settings=settings, work_dir=folder, world_size=processes), folder / "spec.json")
    assert main(["--spec", str(one / "spec.json")]) == 0
    ranks = [sys.executable, "-m", "tasks.training.ranks", "--processes", "2"]
    done = subprocess.run([*ranks, "--spec", str(two / "spec.json")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    histories = [json.loads((folder / "history.json").read_text())["history"] for folder in (one, two)]
    histories = [[entry.get("measured", entry) for entry in history] for history in histories]
    for name in ("loss", "tokens"):
        alone, together = ([entry[name] for entry in history if name in entry] for history in histories)
        assert together == pytest.approx(alone, rel=1e-5)
    first, second = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, two))
    assert max(abs(first[name] - second[name]).max() for name in first) < 1e-5


def test_nothing_to_learn_from_says_what_to_do(spec: Spec) -> None:
    rows = [row("How long?", "No idea."), row("How long?", "<search>pump</search>", split="val")]
    training_set = write_table(table_of(rows, "sft/2"), str(spec.work_dir / "sft.parquet"), "sft/2", {})
    with pytest.raises(TrainingError, match=r"nothing to learn from.*'nothing to learn': 1.*--mask-strategy"):
        train(replace(spec, training_set=training_set))


def test_a_training_of_one_step_learns(spec: Spec) -> None:
    settings = spec.settings.model_copy(update={"batch_size": 100, "epochs": 1})
    train(replace(spec, settings=settings))
    assert [entry["step"] for entry in _steps(spec)] == [1]
    with safe_open(spec.work_dir / "adapter" / "adapter_model.safetensors", "pt") as tensors:
        names = set(tensors.keys())
        moved = {name: tensors.get_tensor(name).abs().max().item() for name in names if ".lora_B." in name}
    assert all(moved.values())  # each begins at zero


def test_where_examples_cannot_share_a_row_they_are_grouped_by_length(spec: Spec, model: Path, tmp_path: Path) -> None:
    """A layer with a sliding window, shorter than the examples, forgets it for a mask of ours."""
    folder = tmp_path / "mistral"
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 16}
    (folder / "config.json").write_text(json.dumps(config))
    losses = {}
    for batching in ("packing", "length-grouped"):
        settings = spec.settings.model_copy(update={"batching": batching, "batch_size": 100, "epochs": 1})
        train(replace(spec, model=str(folder), settings=settings, training=batching))
        losses[batching] = _steps(spec)[0]["loss"]
        assert json.loads((spec.work_dir / "history.json").read_text())["facts"]["batching"] == "length-grouped"
    assert losses["packing"] == pytest.approx(losses["length-grouped"], rel=1e-6)


@given(steps=st.integers(1, 500))
def test_the_learning_rate_rises_to_its_peak_and_falls_and_is_never_zero(steps: int) -> None:
    shares = [share_of_peak(step, steps) for step in range(steps)]
    peak = shares.index(1.0)
    assert peak == int(0.03 * steps)
    assert shares[: peak + 1] == sorted(shares[: peak + 1])
    assert shares[peak:] == sorted(shares[peak:], reverse=True)
    assert min(shares) > 0


def _steps(spec: Spec) -> list[dict[str, Any]]:
    history = json.loads((spec.work_dir / "history.json").read_text())["history"]
    return [entry for entry in history if "loss" in entry]


def test_a_loss_that_is_no_number_stops_it(spec: Spec, capsys: Any) -> None:
    broken = replace(spec, settings=spec.settings.model_copy(update={"lr": 1e30, "epochs": 3}))
    with pytest.raises(TrainingError, match="lower the learning rate"):
        train(broken)
    write_spec(broken, spec.work_dir / "spec.json")
    assert main(["--spec", str(spec.work_dir / "spec.json")]) == TrainingError.exit_code
    assert '"error": "the loss is' in capsys.readouterr().out


def test_sharding_needs_several_processes(spec: Spec) -> None:
    with pytest.raises(TrainingError, match=r"shards a model over processes.*--strategy ddp"):
        train(replace(spec, settings=spec.settings.model_copy(update={"strategy": "fsdp"})))
