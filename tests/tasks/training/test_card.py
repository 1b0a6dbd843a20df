"""The card: what the hub's own reader makes of it, and what it must not hold."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from huggingface_hub import ModelCard

from tasks.artifact import Artifact, provenance
from tasks.config import Agent, Finetune, Format
from tasks.training.card import card

TRAINING_SET = Artifact("/home/someone/sft.parquet", "5e7" * 21, 42, "sft/2")

SETTINGS = Finetune(batch_size=2, gradient_accumulation=3)


def made(
    settings: Finetune = SETTINGS, measured: Mapping[str, float | None] = MappingProxyType({}), **changes: Any
) -> str:
    made_of = provenance(
        {"training_set": TRAINING_SET},
        learned_from={"processed": "ab" * 32},
        questions=40,
        started_from=None,
        settings=settings.model_dump(mode="json"),
        base_model="Qwen/Qwen3-VL-8B-Thinking",
        base_fingerprint="0123456789abcdef",
        world_size=8,
        prompt_fingerprints=["fedcba"],
        set_aside={"too long": 4},
        **dict.fromkeys(("measured_on", "steps", "tokens", "learned_tokens", "trained_parameters"), 7),
        batching="length-grouped",
        examples=1234,
        images=0,
        parts=["language", "merger"],
    )
    written = {"agent": Agent(protocol="tags").model_dump(), "settings": Format().model_dump(), "inputs": {}}
    data = {"formats": ["sft_best"], "provenance": written}
    return card(
        made_of | changes,
        data,
        {"loss": 0.123456, "eval_loss": None, "measured": measured, "seconds": 321.5, "tokens_per_second": 9.0},
    )


def test_the_hub_reads_it() -> None:
    head = ModelCard(made()).data.to_dict()
    assert head["base_model"] == "Qwen/Qwen3-VL-8B-Thinking"
    assert head["library_name"] == "peft"
    assert head["license"] == "unknown"
    assert "lora" in head["tags"]


def test_it_says_data_settings_and_metrics() -> None:
    text = made()
    for said in (
        "| Loss | 0.1235 |",
        "| Loss on examples held out | – |",
        "They may be about documents that it did",
        "| Examples learned from | 1,234 |",
        "| Processes | 8 |",
        f"| Training set | sha256 {TRAINING_SET.sha256} |",
        "| Questions learned from | 40 |",
        "| Parts adapted | language, merger |",
        "| Set aside | 4 too long |",
        f"| Made from | processed sha256 {'ab' * 32} |",
        "| protocol | tags |",
        "| lr | 0.001 |",
        "A step learned from 48 examples",
    ):
        assert said in text


def test_trainings_that_it_went_on_from_stand_in_their_order() -> None:
    first = {
        **{"settings": Finetune(lr=0.5).model_dump(), "examples": 375, "questions": 120, "steps": 48},
        "started_from": dict.fromkeys(("settings", "examples", "questions", "steps", "started_from")),
    }
    text = made(SETTINGS.model_copy(update={"method": "dpo"}), started_from=first)
    assert "## Trained before, 1: made elsewhere" in text
    assert "## Trained before, 2: sft on 375 examples, 120 questions, 48 steps" in text
    assert "| lr | 0.5 |" in text
    assert "Trained before" not in made()


def test_a_method_that_was_added_has_a_card_too() -> None:
    assert "trained by DRAG (method kto)" in made(SETTINGS.model_copy(update={"method": "kto"}))


def test_the_same_training_has_the_same_card_wherever_and_whenever() -> None:
    assert made() == made()
    assert "/home" not in made()
    assert "321.5" not in made()


def test_it_says_what_kind_of_model_it_is_and_what_was_measured_on_what_was_held_out() -> None:
    preferring = made(SETTINGS.model_copy(update={"method": "dpo"}), {"accuracy": 0.75, "margin": 0.5})
    assert "searches documents" in preferring
    assert "| Share of pairs held out that are told apart | 0.75 |" in preferring
    assert "| Started from | base model |" in preferring
    scoring = made(SETTINGS.model_copy(update={"method": "reward"}), {"spearman": 0.5, "spearman_within": None})
    assert ModelCard(scoring).data.to_dict()["pipeline_tag"] == "text-classification"
    assert "scores search queries" in scoring
    assert "| Spearman's ρ with the rank score, queries held out | 0.5 |" in scoring
    assert "| Spearman's ρ within a question, mean of those held out | – |" in scoring
