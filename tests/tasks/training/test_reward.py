"""The reward model: its loss is the documented one, it ranks what it has not seen, and scores the same wherever it is loaded."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tasks.agent.message import scored_query
from tasks.artifact import Artifact, fetch_folder, provenance, read_provenance, read_rows, table_of, write_table
from tasks.config import Finetune
from tasks.errors import ConfigError
from tasks.training import launch, reward
from tasks.training.examples import Example, Item
from tasks.training.loading import load_tokenizer
from tasks.training.merge import merge
from tasks.training.scoring import open_scorer
from tasks.training.spec import Spec
from tasks.training.train import train
from tests.tasks.training.training_rows import asked_and_searched, reward_rows
from tests.tiny_model import tiny_model

SETTINGS = Finetune(method="reward", lora_r=8, epochs=8, batch_size=4, lr=5e-3, bf16=False, save_steps=1000)


@pytest.fixture(scope="module", params=["regression", "pairs"])
def trained(
    request: pytest.FixtureRequest, scored: Artifact, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    folder = tmp_path_factory.mktemp("reward")
    settings = SETTINGS.model_copy(update={"reward_loss": request.param})
    return launch.finetune(scored, str(model), settings, str(folder / "out"), folder / "work", lambda *_: None)


def queries(scored: Artifact, split: str) -> list[dict[str, Any]]:
    return [row for row in read_rows(scored) if row["split"] == split]


def test_it_ranks_queries_of_questions_that_it_has_not_seen(trained: Any, scored: Artifact, model: Path) -> None:
    reward_model, curve = trained
    assert (reward_model.schema, curve.schema) == ("reward-model/1", "loss_curve/2")
    rows = queries(scored, "val")
    score = open_scorer(reward_model, str(model))
    given = score([asked_and_searched(row) for row in rows])
    # what the trainer measured is what the function gives
    found = read_provenance(reward_model)["measured"]
    wanted = [row["score"] for row in rows]
    assert found["spearman"] == pytest.approx(stats.spearmanr(wanted, given)[0], abs=1e-3)
    assert found["kendall"] == pytest.approx(stats.kendalltau(wanted, given)[0], abs=1e-3)
    assert found["spearman_within"] > 0.9
    assert found["kendall_within"] > 0.9
    assert {entry["name"] for entry in read_rows(curve)[-1]["measured"]} == set(found)
    card = (fetch_folder(reward_model) / "README.md").read_text()
    assert f"| Spearman's ρ within a question, mean of those held out | {found['spearman_within']:.4g} |" in card
    assert "# A reward model" in card


def test_merged_and_by_peft_alone_it_gives_the_same_scores(
    trained: Any, scored: Artifact, model: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    rows = queries(scored, "val")[:7]
    expected = open_scorer(trained[0], str(model))([asked_and_searched(row) for row in rows])
    merged = fetch_folder(merge(trained[0], str(model), str(tmp_path / "merged")))
    by_peft = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(model, num_labels=1), fetch_folder(trained[0])
    )
    tokenizer = load_tokenizer(merged)
    for network in (AutoModelForSequenceClassification.from_pretrained(merged), by_peft):
        network.eval()
        for row, score in zip(rows, expected, strict=True):
            question, query = asked_and_searched(row)
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
            )
            ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            ids += tokenizer(query, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                assert network(input_ids=torch.tensor([ids])).logits.item() == pytest.approx(score, abs=1e-4)
    with pytest.raises(ConfigError, match="another model"):
        open_scorer(trained[0], str(tiny_model(tmp_path / "other", seed=3)))


@given(
    scores=st.lists(st.sampled_from([0.0, 1 / 3, 2 / 3, 1.0]), min_size=1, max_size=6),
    given_=st.lists(st.floats(-9, 9), min_size=6, max_size=6),
)
def test_the_loss_is_that_of_the_formula(scores: list[float], given_: list[float]) -> None:
    order = torch.randperm(len(scores))  # tokens come in the order of rows, not of queries
    logits = torch.tensor(given_[: len(scores)])[order][:, None]
    batch = {"owners": order}
    for kind in ("regression", "pairs"):
        settings = Finetune(method="reward", reward_loss=kind)
        pairs = reward._pairs(scores) if kind == "pairs" else ()
        if kind == "pairs" and not pairs:
            continue  # nothing is learned from it
        items = [Item(tuple(Example((0, i), (1,)) for i in range(len(scores))), pairs, tuple(scores))]
        found = reward.columns(logits, batch | reward.terms(items, batch, settings), settings, None)
        assert found["score"].tolist() == pytest.approx(given_[: len(scores)])
        both = list(zip(scores, given_, strict=False))
        if kind == "regression":
            expected = [(own - score) ** 2 for score, own in both]
        else:
            expected = [math.log1p(math.exp(b - a)) for s, a in both for t, b in both if s > t]
        assert sorted(found["loss"].tolist()) == pytest.approx(sorted(expected), rel=1e-4, abs=1e-5)


def test_every_question_counts_alike_however_many_pairs_it_has(scored: Artifact, model: Path) -> None:
    rows = queries(scored, "train")
    few, many = rows[:2], [{**row, "question_id": "many", "score": i / 9} for i, row in enumerate(rows[:9])]
    settings = SETTINGS.model_copy(update={"reward_loss": "pairs"})
    items = reward.load([*few, *many], load_tokenizer(model), settings).train
    sums = [math.fsum(pair.weight for pair in item.pairs) for item in items]
    pairs = sum(len(item.pairs) for item in items)
    assert len(items) == 2
    assert len({len(item.pairs) for item in items}) == 2
    assert sums == pytest.approx([pairs / 2] * 2)
    losses = [
        float(item is items[0]) for item in items for _ in item.pairs
    ]  # one question is learned, one is not at all
    measured = {"loss": losses, "score": [0.0] * sum(len(item.examples) for item in items)}
    assert reward.metrics(items, measured)["loss"] == pytest.approx(0.5)


def test_correlations_are_null_where_there_is_nothing_to_tell_apart() -> None:
    example = Example((0, 1), (1,))
    alike = Item((example, example), (), (1.0, 1.0))
    apart = Item((example, example), (), (0.0, 1.0))
    measured = {"loss": [1.0], "score": [0.0, 3.0]}
    told = reward.metrics([alike], measured)
    assert [told[name] for name in ("spearman", "kendall_within")] == [None, None]
    assert reward.metrics([apart], measured)["spearman_within"] == pytest.approx(1)
    assert reward.metrics([apart], measured | {"score": [2.0, 2.0]})["spearman_within"] == 0
    assert reward.metrics([alike, apart], measured | {"score": [0.0, 3.0, 2.0, 1.0]})[
        "kendall_within"
    ] == pytest.approx(-1)


def test_pairs_are_measured_on_all_that_scores_are(model: Path, tmp_path: Path) -> None:
    """Also on questions whose queries all scored alike, of which no pair can be made."""
    asked = [
        {"role": "user", "content": "Who wrote it?"}
    ]  # scores of what is the same elsewhere would differ by a rounding
    alike = [{**row, "question_id": "a", "prompt": asked, "split": "val", "score": 0.0} for row in reward_rows(1)]
    rows = [*reward_rows(16), *alike]
    table = write_table(table_of(rows, "reward/3"), str(tmp_path / "reward.parquet"), "reward/3", provenance())
    settings = SETTINGS.model_copy(update={"reward_loss": "pairs", "epochs": 1})
    made, _ = launch.finetune(table, str(model), settings, str(tmp_path / "out"), tmp_path / "work", lambda *_: None)
    val = queries(table, "val")
    assert sum(row["question_id"] == "a" for row in val) == len(alike)
    given = open_scorer(made, str(model))([asked_and_searched(row) for row in val])
    facts = read_provenance(made)
    assert facts["measured"]["spearman"] == pytest.approx(
        stats.spearmanr([row["score"] for row in val], given)[0], abs=1e-3
    )
    assert facts["set_aside"] == {}


def test_what_a_kill_leaves_behind_gives_the_same_model(scored: Artifact, model: Path, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"epochs": 0.5, "save_steps": 2, "bf16": True})
    spec = Spec("training", scored, str(model), "tiny", False, settings, tmp_path, 1, None)
    made, checkpoints = tmp_path / "adapter" / "adapter_model.safetensors", tmp_path / "checkpoints"
    train(spec)
    whole = made.read_bytes()
    last = max(checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    (last / "complete.json").unlink()
    made.unlink()
    train(spec)
    assert made.read_bytes() == whole
    history = json.loads((tmp_path / "history.json").read_text())["history"]
    assert [entry["step"] for entry in history if "loss" in entry] == list(range(1, history[-1]["step"] + 1))


def test_a_question_s_queries_are_one_item_and_those_that_all_scored_alike_teach_no_order(
    scored: Artifact, model: Path
) -> None:
    tokenizer, rows = load_tokenizer(model), queries(scored, "train")
    items = reward.load([*rows, rows[0]], tokenizer, SETTINGS)
    assert {len(item.examples) for item in items.train} == {3}
    alike = [{**row, "score": 1.0} for row in rows[:3]]
    pairwise = SETTINGS.model_copy(update={"reward_loss": "pairs"})
    assert reward.load(alike, tokenizer, pairwise).set_aside == {"all alike": 3}
    assert [item.count for item in reward.load(rows, tokenizer, pairwise).train] == [3] * (len(rows) // 3)
    assert replace(items.train[0].examples[0], weight=1.0) == reward.example_of(
        scored_query(*min(asked_and_searched(row) for row in rows if row["score"] == 1)), tokenizer
    )


def test_nothing_else_of_the_base_is_trained(trained: Any) -> None:
    from safetensors import safe_open

    with safe_open(fetch_folder(trained[0]) / "adapter_model.safetensors", "pt") as tensors:
        names = set(tensors.keys())
    assert {name for name in names if "lora_" not in name} == {"base_model.model.score.weight"}
