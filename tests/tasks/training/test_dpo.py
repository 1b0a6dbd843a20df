"""DPO: its loss is the formula, the better query becomes likelier than the worse one, and what it starts from is what counts."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tasks.artifact import Artifact, fetch_folder, read_provenance, read_rows, table_of, write_folder, write_table
from tasks.config import Finetune
from tasks.errors import ConfigError, TrainingError
from tasks.model import model_fingerprint
from tasks.training import dpo, launch
from tasks.training.examples import Example, Item, Pair
from tasks.training.lineage import trainings
from tasks.training.loading import load_model, load_tokenizer
from tasks.training.merge import merge
from tasks.training.spec import Spec, write_spec
from tasks.training.train import main, train
from tests.tasks.training.several import SHARDS_ON_A_CPU, inject
from tests.tasks.training.training_rows import pair_rows
from tests.tiny_model import tiny_model

SETTINGS = Finetune(method="dpo", bf16=False, lora_r=4, epochs=1, batch_size=4, beta=0.3, margin_scale=0.5)


@pytest.fixture
def spec(pairs: Artifact, model: Path, tmp_path: Path) -> Spec:
    return Spec("training", pairs, str(model), "tiny", False, SETTINGS, tmp_path, 1, None)


def history(spec: Spec) -> list[dict[str, Any]]:
    return json.loads((spec.work_dir / "history.json").read_text())["history"]


@given(
    margins=st.lists(st.floats(-50, 50), min_size=1, max_size=5),
    gap=st.floats(0.1, 1),
    scale=st.floats(0, 5),
    beta=st.floats(0.01, 2),
)
def test_the_loss_is_that_of_the_formula(margins: list[float], gap: float, scale: float, beta: float) -> None:
    """With a vocabulary of two, in which token 1 has log-odds `margin` against what the reference says of it."""
    settings = Finetune(method="dpo", beta=beta, margin_scale=scale)
    items = [Item((Example((0, 1), (1,)), Example((0, 0), (1,))), (Pair(0, 1, gap),)) for _ in margins]
    owners = torch.arange(2 * len(margins))
    batch = {"owners": owners, "labels": torch.tensor([1, 0] * len(margins))}
    batch |= dpo.terms(items, batch, settings)
    logits = torch.tensor([[0.0, margin] for margin in margins for _ in range(2)], dtype=torch.float32)
    found = dpo.columns(logits, batch, settings, torch.zeros_like(logits))
    for margin, own, loss in zip(margins, found["margin"].tolist(), found["loss"].tolist(), strict=True):
        # log p(1) − log p(0) is the margin, and the reference's is 0
        assert own == pytest.approx(beta * margin, abs=1e-3)
        away = beta * margin - scale * gap
        assert loss == pytest.approx(math.log1p(math.exp(-away)) if away > -30 else -away, rel=1e-3, abs=1e-3)


def log_p(network: Any, example: Example) -> torch.Tensor:
    """Of the learned tokens, from a forward pass over the whole sequence by itself."""
    logits = network(input_ids=torch.tensor([example.ids])).logits[0].log_softmax(-1)
    return sum(logits[target - 1, example.ids[target]] for target in example.targets)  # type: ignore[return-value]


@pytest.mark.parametrize("batching", ["packing", "length-grouped"])
def test_what_is_measured_is_what_whole_forward_passes_give(spec: Spec, batching: str, tmp_path: Path) -> None:
    """The loss on pairs held out, after training, of adapter and base computed pair by pair."""
    from peft import PeftModel

    train(replace(spec, settings=SETTINGS.model_copy(update={"batching": batching, "lr": 3e-3})))
    first = next(entry for entry in history(spec) if "loss" in entry)
    found = next(entry["measured"] for entry in history(spec) if "measured" in entry)
    rows = [row for row in read_rows(spec.training_set) if row["split"] == "val"]
    tokenizer = load_tokenizer(spec.model)
    base = load_model(spec.model, bf16=False).eval()
    trained = PeftModel.from_pretrained(load_model(spec.model, bf16=False), spec.work_dir / "adapter").eval()
    losses, margins = [], []
    for row in rows:
        better, worse = (dpo._example(row, side, tokenizer, SETTINGS) for side in ("chosen", "rejected"))
        with torch.no_grad():
            gained = [log_p(trained, example) - log_p(base, example) for example in (better, worse)]
        margins.append(0.3 * (gained[0] - gained[1]).item())
        wanted = 0.5 * (row["chosen_score"] - row["rejected_score"])
        losses.append(math.log1p(math.exp(wanted - margins[-1])))
    assert len(rows) == 12
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert found["margin"] == pytest.approx(sum(margins) / len(margins), rel=1e-3)
    assert found["accuracy"] == sum(margin > 0 for margin in margins) / len(margins)
    # before the first step policy and reference are one, so that the margin alone makes the loss
    batch = [math.log1p(math.exp(0.5 * gap)) for gap in (1 / 3, 1.0, 2 / 3)]
    assert first["loss"] == pytest.approx(sum(batch) / 3, rel=1e-5)


def test_the_better_query_becomes_likelier_and_a_prompt_is_computed_once(spec: Spec) -> None:
    train(
        replace(spec, settings=SETTINGS.model_copy(update={"epochs": 3, "lr": 5e-3, "bf16": True, "margin_scale": 0.0}))
    )
    losses = [entry["loss"] for entry in history(spec) if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), rel=1e-3)
    assert losses[-1] < losses[0] / 2
    measured = [entry["measured"] for entry in history(spec) if "measured" in entry]
    assert len(measured) == 3
    assert measured[-1]["accuracy"] > 0.9
    assert measured[-1]["margin"] > max(1, measured[0]["margin"])
    facts = json.loads((spec.work_dir / "history.json").read_text())["facts"]
    assert (facts["examples"], facts["measured_on"], facts["set_aside"]) == (60, 12, {})
    assert facts["computed_tokens"] < facts["tokens"] / 2


@pytest.fixture
def start(model: Path, tmp_path: Path) -> Artifact:
    """An adapter that changes what the base says."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(load_model(model, bf16=False), config).save_pretrained(tmp_path / "saved")
    facts = {"base_fingerprint": model_fingerprint(model), "settings": {"method": "sft"}, "examples": 9, "steps": 3}
    return write_folder(tmp_path / "saved", str(tmp_path / "start"), "adapter/1", 1, facts)


def test_from_an_adapter_that_is_the_reference_and_what_is_made_is_one_adapter(
    start: Artifact, pairs: Artifact, model: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from safetensors.torch import load_file

    settings = SETTINGS.model_copy(update={"margin_scale": 0.0, "lr": 1e-2})
    adapter, curve = launch.finetune(
        pairs, str(model), settings, str(tmp_path / "out"), tmp_path / "work", lambda *_: None, start=start
    )
    made_of = read_provenance(adapter)
    losses = [row["loss"] for row in read_rows(curve)]
    assert losses[0] == pytest.approx(math.log(2), rel=1e-5)  # at first, policy and reference are one
    before, after = (load_file(fetch_folder(made) / "adapter_model.safetensors") for made in (start, adapter))
    assert before.keys() == after.keys()
    assert made_of["inputs"]["start"] == start.sha256
    card = (fetch_folder(adapter) / "README.md").read_text()
    assert f"| Started from | adapter sha256 {start.sha256} |" in card
    assert [(t["settings"]["method"], t["examples"], t["questions"]) for t in trainings(made_of)] == [
        ("sft", 9, None),
        ("dpo", made_of["examples"], len({row["question_id"] for row in read_rows(pairs) if row["split"] == "train"})),
    ]
    assert "## Trained before, 1: sft on 9 examples, 3 steps" in card
    assert f"| Share of pairs held out that are told apart | {made_of['measured']['accuracy']:.4g} |" in card
    assert adapter.schema == "adapter/1"
    # over the base alone, it has won what was measured against the adapter that it started from
    networks = [
        PeftModel.from_pretrained(load_model(model, bf16=False), fetch_folder(m)).eval() for m in (adapter, start)
    ]
    tokenizer = load_tokenizer(model)
    margins = []
    for row in read_rows(pairs):
        if row["split"] == "val":
            better, worse = (dpo._example(row, side, tokenizer, SETTINGS) for side in ("chosen", "rejected"))
            with torch.no_grad():
                now, then = [(log_p(network, better) - log_p(network, worse)).item() for network in networks]
            margins.append(0.3 * (now - then))
    merged = load_model(fetch_folder(merge(adapter, str(model), str(tmp_path / "merged"))), bf16=False)
    with torch.no_grad():
        assert log_p(merged, better).item() == pytest.approx(log_p(networks[0], better).item(), abs=1e-3)
    assert made_of["measured"]["margin"] == pytest.approx(sum(margins) / len(margins), rel=1e-3)


def test_an_adapter_that_cannot_be_started_from_is_refused(spec: Spec, start: Artifact) -> None:
    with pytest.raises(TrainingError, match="set lora_r to 4"):
        train(replace(spec, settings=SETTINGS.model_copy(update={"lora_r": 8}), start=start))
    other = str(tiny_model(spec.work_dir / "other", seed=5))
    with pytest.raises(ConfigError, match="trained on another model"):
        launch.finetune(spec.training_set, other, SETTINGS, "out", spec.work_dir / "work", lambda *_: None, start=start)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_learn_what_one_learns_from_twice_the_batches(
    spec: Spec, start: Artifact, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From an adapter, whose frozen copy is sharded like it."""
    from safetensors.numpy import load_file

    one, two = spec.work_dir / "one", spec.work_dir / "two"
    for folder, processes in ((one, 1), (two, 2)):
        folder.mkdir()
        settings = SETTINGS.model_copy(
            update={
                "batch_size": 2,
                "gradient_accumulation": 2 // processes,
                "strategy": strategy if processes == 2 else "ddp",
            }
        )
        write_spec(
            replace(spec, settings=settings, work_dir=folder, world_size=processes, start=start), folder / "spec.json"
        )
    assert main(["--spec", str(one / "spec.json")]) == 0
    if strategy == "fsdp":
        inject(SHARDS_ON_A_CPU, spec.work_dir / "fault", monkeypatch)
    ranks = [sys.executable, "-m", "tasks.training.ranks", "--processes", "2"]
    done = subprocess.run([*ranks, "--spec", str(two / "spec.json")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    alone, together = (history(replace(spec, work_dir=folder)) for folder in (one, two))
    for name in ("loss", "measured"):
        found, expected = ([entry[name] for entry in entries if name in entry] for entries in (together, alone))
        assert len(found) > 0
        for value, other in zip(found, expected, strict=True):
            assert value == pytest.approx(other, rel=1e-4)
    first, second = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, two))
    assert first.keys() == second.keys()
    assert max(abs(first[name] - second[name]).max() for name in first) < 1e-5


def test_what_a_kill_leaves_behind_gives_the_same_adapter(spec: Spec, start: Artifact) -> None:
    """From an adapter, so that the reference is not what the checkpoint holds."""
    resumable = replace(spec, settings=SETTINGS.model_copy(update={"save_steps": 2}), start=start)
    adapter, checkpoints = spec.work_dir / "adapter" / "adapter_model.safetensors", spec.work_dir / "checkpoints"
    train(resumable)
    whole, told = adapter.read_bytes(), history(spec)
    assert {path.name for path in checkpoints.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-5"}
    # the last checkpoint was cut off in writing
    (checkpoints / "checkpoint-5" / "complete.json").unlink()
    adapter.unlink()
    train(resumable)
    assert adapter.read_bytes() == whole
    losses = [[entry["loss"] for entry in entries if "loss" in entry] for entries in (told, history(spec))]
    assert losses[0] == losses[1]


def test_what_cannot_be_compared_is_set_aside(spec: Spec) -> None:
    rows = pair_rows(2)
    rows[0]["chosen"] = [{"role": "assistant", "content": "No idea."}]
    rows[1]["rejected"] = rows[1]["chosen"]
    rows[2] |= {"rank_score": 0.0}
    settings = SETTINGS.model_copy(update={"weight_scheme": "rank-score"})
    rows = [row | {"split": "train"} for row in rows]
    items = dpo.load(rows, load_tokenizer(spec.model), settings)
    assert items.set_aside == {"nothing to learn": 1, "the same": 1, "weight 0": 1}
    (item,) = items.train
    assert [len(item.examples), len(item.pairs)] == [3, 3]
    assert {(pair.better, pair.worse): round(pair.gap, 3) for pair in item.pairs} == {
        (0, 1): 0.333,
        (0, 2): 1.0,
        (1, 2): 0.667,
    }
    empty = write_table(table_of(rows[:1], "dpo/3"), str(spec.work_dir / "dpo.parquet"), "dpo/3", {})
    with pytest.raises(TrainingError, match="nothing to learn from"):
        train(replace(spec, training_set=empty))


def test_a_pair_weighs_what_its_better_query_does_and_those_to_measure_on_all_count(spec: Spec) -> None:
    tokenizer = load_tokenizer(spec.model)

    def weights(split: str, **settings: Any) -> list[float]:
        scores = ({"rank_score": score, "gt_rank": rank} for score, rank in ((1.0, 1), (0.5, 2), (0.5, 2)))
        rows = [row | score | {"split": split} for row, score in zip(pair_rows(1), scores, strict=True)]
        items = dpo.load(rows, tokenizer, SETTINGS.model_copy(update=settings))
        return [pair.weight for item in (*items.train, *items.val) for pair in item.pairs]

    assert weights("train", weight_scheme="rank-score") == pytest.approx([1.5, 0.75, 0.75])
    assert weights("train", weight_scheme="binary") == [1.0]
    assert weights("val", weight_scheme="binary") == [1.0] * 3


def test_another_method_s_training_set_is_refused(training_set: Artifact, model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="method dpo does not learn from a training set of schema sft/2"):
        launch.finetune(training_set, str(model), SETTINGS, str(tmp_path / "out"), tmp_path / "work", lambda *_: None)


def test_a_pair_without_scores_has_no_gap_and_no_margin(spec: Spec) -> None:
    rows = [row | {"rejected_score": None} for row in pair_rows(2)]
    tokenizer = load_tokenizer(spec.model)
    loaded = dpo.load(rows, tokenizer, SETTINGS.model_copy(update={"margin_scale": 0.0}))
    assert {pair.gap for item in [*loaded.train, *loaded.val] for pair in item.pairs} == {0.0}
    with pytest.raises(TrainingError, match="has no scores, which margin_scale counts by"):
        dpo.load(rows, tokenizer, SETTINGS)
