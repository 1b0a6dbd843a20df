"""DPO with page images, and a reward model of a model that sees: what is computed is what the model's own code computes."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from transformers import AutoModelForSequenceClassification

from tasks.agent.message import scored_query
from tasks.artifact import (
    Artifact,
    fetch_folder,
    provenance,
    read_provenance,
    read_rows,
    table_of,
    write_folder,
    write_table,
)
from tasks.config import Finetune
from tasks.model import model_fingerprint
from tasks.training import launch
from tasks.training.loading import load_model, load_tokenizer
from tasks.training.merge import merge
from tasks.training.parts import part_of
from tasks.training.reward import example_of
from tasks.training.scoring import open_scorer
from tasks.training.spec import Spec
from tasks.training.train import train
from tests.tasks.training.pictures import own_log_p, shown
from tests.tasks.training.training_rows import asked_and_searched, pair_rows

BETA, SCALE = 0.3, 0.5
QUERIES = {"warranty of the pump": 1.0, "warranty": 2 / 3, "pump": 0.0}


def seen_pairs() -> list[dict[str, Any]]:
    """Pairs behind images, some of the same words behind other images, and pairs behind text alone."""
    found = pair_rows(1)
    for question, pages, split in (("How long?", (0, 1), "train"), ("How long?", (1, 2), "train"), ("?", (2,), "val")):
        made = shown(question, "", *pages, split=split)
        common = {name: made[name] for name in found[0].keys() & made.keys()}
        for chosen, rejected in (("warranty of the pump", "warranty"), ("warranty of the pump", "pump")):
            sides = {
                side: [{"role": "assistant", "content": f"<search>{query}</search>"}]
                for side, query in (("chosen", chosen), ("rejected", rejected))
            }
            found.append(common | sides | {"chosen_score": QUERIES[chosen], "rejected_score": QUERIES[rejected]})
    return found


@pytest.fixture(scope="module")
def start(vlm: Path, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """An adapter of language and merger that has learned, with images."""
    folder = tmp_path_factory.mktemp("start")
    rows = [shown("How long?", "pump", 0, 1), shown("How long?", "the pump", 1, 2)]
    stored = write_table(table_of(rows, "sft/2"), str(folder / "sft.parquet"), "sft/2", provenance())
    settings = Finetune(bf16=False, epochs=6, lora_r=4, lr=0.02)
    train(Spec("training", stored, str(vlm), "tiny", False, settings, folder, 1, None, images_root=str(root)))
    facts = {"base_fingerprint": model_fingerprint(vlm)}
    return write_folder(folder / "adapter", str(folder / "stored"), "adapter/1", 1, facts)


@pytest.mark.parametrize("batching", ["packing", "length-grouped"])
def test_dpo_with_images_from_an_adapter(batching: Any, start: Artifact, vlm: Path, root: Path, tmp_path: Path) -> None:
    """Its loss on a held-out pair, of adapter and reference computed pair by pair; the parts that moved are those chosen."""
    from peft import PeftModel
    from safetensors.numpy import load_file

    rows = seen_pairs()
    pairs = write_table(table_of(rows, "dpo/3"), str(tmp_path / "dpo.parquet"), "dpo/3", provenance())
    settings = Finetune(method="dpo", bf16=False, epochs=4, batch_size=2, lora_r=4, lr=0.01, beta=BETA)
    settings = settings.model_copy(
        update={"margin_scale": SCALE, "batching": batching, "parts": ["language", "merger"]}
    )
    spec = Spec("training", pairs, str(vlm), "tiny", False, settings, tmp_path, 1, None, start, images_root=str(root))
    train(spec)
    left = json.loads((tmp_path / "history.json").read_text())
    assert left["facts"]["images"] == 3

    before, after = (
        load_file(folder / "adapter_model.safetensors") for folder in (fetch_folder(start), tmp_path / "adapter")
    )
    assert before.keys() == after.keys()
    moved = {part_of(name) for name, value in after.items() if (value != before[name]).any()}
    assert moved == {"language", "merger"}

    tokenizer = load_tokenizer(vlm)
    reference, trained = (
        PeftModel.from_pretrained(load_model(vlm, bf16=False), folder).eval()
        for folder in (fetch_folder(start), tmp_path / "adapter")
    )

    def gained(row: dict[str, Any], side: str) -> float:
        now, then = (
            own_log_p(network, tokenizer, vlm, root, row["prompt"], row[side][0]["content"]).sum().item()
            for network in (trained, reference)
        )
        return now - then

    losses, margins = [], []
    for row in read_rows(pairs):
        if row["split"] == "val":  # three of text, two behind images
            margins.append(BETA * (gained(row, "chosen") - gained(row, "rejected")))
            losses.append(math.log1p(math.exp(SCALE * (row["chosen_score"] - row["rejected_score"]) - margins[-1])))
    assert max(map(abs, margins)) > 0.05, "it learned"
    assert len(margins) == 5
    measured = [entry["measured"] for entry in left["history"] if "measured" in entry][-1]
    assert measured["margin"] == pytest.approx(sum(margins) / len(margins), rel=1e-3)
    assert measured["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_a_reward_model_of_what_sees_scores_as_it_was_measured(scored: Artifact, vlm: Path, tmp_path: Path) -> None:
    settings = Finetune(method="reward", lora_r=8, epochs=4, batch_size=4, lr=5e-3, bf16=False)
    made, _ = launch.finetune(scored, str(vlm), settings, str(tmp_path / "out"), tmp_path / "work", lambda *_: None)
    facts = read_provenance(made)
    assert facts["parts"] == ["language"]  # questions and queries are text
    rows = [row for row in read_rows(scored) if row["split"] == "val"]
    given = open_scorer(made, str(vlm))([asked_and_searched(row) for row in rows])
    assert facts["measured"]["spearman_within"] > 0.5
    assert facts["measured"]["spearman"] == pytest.approx(spearmanr([row["score"] for row in rows], given)[0], abs=1e-3)

    merged = fetch_folder(merge(made, str(vlm), str(tmp_path / "merged")))
    alone, tokenizer = AutoModelForSequenceClassification.from_pretrained(merged), load_tokenizer(merged)
    texts = [example_of(scored_query(*asked_and_searched(row)), tokenizer).ids[:-1] for row in rows]
    assert len(set(map(len, texts))) > 1
    ids = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(text) for text in texts], batch_first=True, padding_value=tokenizer.pad_token_id
    )
    with torch.no_grad():
        scores = alone(ids, attention_mask=ids != tokenizer.pad_token_id).logits.flatten().tolist()
    assert scores == pytest.approx(given, abs=1e-4)
    assert not list(merged.glob("*processor_config.json"))
