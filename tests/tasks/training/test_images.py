"""Training with page images, on a tiny Qwen3-VL: what is computed is what the model's own code computes, and where it learns."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.artifact import Artifact, fetch_folder, provenance, read_rows, table_of, write_folder, write_table
from tasks.config import Finetune, Part
from tasks.errors import TrainingError
from tasks.model import model_fingerprint
from tasks.training import dpo, sft
from tasks.training.loading import load_model, load_tokenizer
from tasks.training.merge import merge
from tasks.training.parts import part_of
from tasks.training.sight import Sight
from tasks.training.spec import Spec, write_spec
from tasks.training.train import train
from tests.tasks.training.pictures import own_log_p, page, shown
from tests.tasks.training.recomputed import assert_recompute_changes_nothing
from tests.tasks.training.several import SHARDS_ON_A_CPU, inject
from tests.tasks.training.training_rows import pair_rows, row, rows


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Rows that show images, some the same ones behind the same words, and one that shows none."""
    found = [
        shown("How long?", "warranty", 0, 1),
        shown("How long?", "warranty of the pump", 0, 1),
        shown("How long?", "warranty", 1, 2),  # the same words behind other images
        row("How heavy?", "<search>mass</search>"),
        shown("How high?", "height", 2, split="val"),
    ]
    uri = str(tmp_path_factory.mktemp("training-set") / "sft.parquet")
    return write_table(table_of(found, "sft/2"), uri, "sft/2", provenance())


@pytest.fixture
def spec(seen: Artifact, vlm: Path, root: Path, tmp_path: Path) -> Spec:
    settings = Finetune(bf16=False, epochs=2, lora_r=4)  # two steps; in the first the learning rate is still 0
    return Spec("training", seen, str(vlm), "tiny", False, settings, tmp_path, 1, None, images_root=str(root))


def tensors(spec: Spec) -> dict[str, Any]:
    from safetensors.numpy import load_file

    return load_file(spec.work_dir / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("batching", ["length-grouped", "packing"])
def test_the_loss_is_that_of_the_models_own_code(spec: Spec, root: Path, batching: str) -> None:
    train(replace(spec, settings=spec.settings.model_copy(update={"batching": batching})))
    left = json.loads((spec.work_dir / "history.json").read_text())
    assert left["facts"]["images"] == 3

    tokenizer, network = load_tokenizer(spec.model), load_model(spec.model, bf16=False)
    learned = [
        own_log_p(network, tokenizer, Path(spec.model), root, row["prompt"], row["completion"][0]["content"])
        for row in read_rows(spec.training_set)
        if row["split"] == "train"
    ]
    loss = next(entry["loss"] for entry in left["history"] if "loss" in entry)
    assert loss == pytest.approx(-torch.cat(learned).mean().item(), rel=1e-4)


@pytest.mark.parametrize(
    ("parts", "moved"),
    [
        (["language"], {"language"}),
        (["merger"], {"merger"}),
        (["vision"], {"vision"}),
        (Finetune().parts, {"language", "merger"}),
        (["language", "merger", "vision"], {"language", "merger", "vision"}),
    ],
)
def test_only_the_chosen_parts_move(spec: Spec, parts: list[Part], moved: set[str]) -> None:
    train(replace(spec, settings=spec.settings.model_copy(update={"parts": parts})))
    learned = tensors(spec)
    assert {part_of(name) for name in learned} == moved
    layers = {name: abs(value).max() for name, value in learned.items() if ".lora_B." in name}
    assert all(layers.values())  # each begins at zero
    assert not any("lm_head" in name or "embed" in name for name in layers)
    left = json.loads((spec.work_dir / "history.json").read_text())
    assert set(left["facts"]["parts"]) == moved


def test_each_part_has_a_learning_rate_of_its_own(spec: Spec) -> None:
    """A first step of Adam moves every number by about the learning rate."""
    parts: list[Part] = ["language", "merger", "vision"]
    train(replace(spec, settings=spec.settings.model_copy(update={"parts": parts, "merger_lr_factor": 3.0})))
    steps: dict[str, float] = {}
    for name, value in tensors(spec).items():
        if ".lora_B." in name:
            steps[part_of(name)] = max(steps.get(part_of(name), 0.0), float(abs(value).max()))
    assert steps["merger"] / steps["language"] == pytest.approx(3.0, rel=0.02)
    assert steps["vision"] / steps["language"] == pytest.approx(0.1, rel=0.02)


def test_text_alone_teaches_nothing_that_sees(spec: Spec, tmp_path: Path) -> None:
    text = write_table(table_of(rows(6), "sft/2"), str(tmp_path / "text.parquet"), "sft/2", provenance())
    train(replace(spec, training_set=text))
    assert {part_of(name) for name in tensors(spec)} == {"language"}
    only = spec.settings.model_copy(update={"parts": ["merger", "vision"]})
    with pytest.raises(TrainingError, match="learn nothing from a training set without images"):
        train(replace(spec, training_set=text, settings=only))


def test_going_on_from_an_adapter_on_text_leaves_what_sees_as_it_was(spec: Spec, tmp_path: Path) -> None:
    """By two processes, which wait for each other over every parameter that is to learn; and again from its last checkpoint."""
    learned = spec.settings.model_copy(update={"lr": 0.01})
    train(replace(spec, settings=learned))
    before = tensors(spec)
    start = write_folder(spec.work_dir / "adapter", str(tmp_path / "stored"), "adapter/1", 1, {})
    text = write_table(table_of(pair_rows(6), "dpo/3"), str(tmp_path / "dpo.parquet"), "dpo/3", provenance())
    settings = learned.model_copy(update={"method": "dpo", "batch_size": 2, "epochs": 1, "save_steps": 1})
    after = replace(spec, training_set=text, start=start, settings=settings, work_dir=tmp_path / "after", world_size=2)
    after.work_dir.mkdir()
    write_spec(after, after.work_dir / "spec.json")
    ranks = [sys.executable, "-m", "tasks.training.ranks", "--processes", "2"]
    command = [*ranks, "--spec", str(after.work_dir / "spec.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((after.work_dir / "history.json").read_text())["facts"]["parts"] == ["language"]
    found = tensors(after)
    assert found.keys() == before.keys()
    moved = {part_of(name) for name, value in found.items() if (value != before[name]).any()}
    assert moved == {"language"}
    # the last checkpoint was cut off in writing: what goes on from the one before it ends at the same
    newest = max((after.work_dir / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    (newest / "complete.json").unlink()
    train(replace(after, world_size=1))
    assert {part_of(name) for name, value in tensors(after).items() if (value != before[name]).any()} == {"language"}


def test_activations_that_are_computed_again_are_those_that_were_kept(
    spec: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the tower too, whose features enter several layers."""
    parts: list[Part] = ["language", "merger", "vision"]
    settings = spec.settings.model_copy(update={"parts": parts})
    assert_recompute_changes_nothing(replace(spec, settings=settings), monkeypatch)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_that_see_learn_what_one_learns_from_twice_the_batches(
    spec: Spec, strategy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With activations computed again, as large models are trained; some batches show no image to one of them."""
    if strategy == "fsdp":
        inject(SHARDS_ON_A_CPU, tmp_path / "fault", monkeypatch)
    parts: list[Part] = ["language", "merger", "vision"]
    for processes in (1, 2):
        update: dict[str, Any] = {"batch_size": 1, "gradient_accumulation": 4 // processes, "epochs": 3}
        update |= {"recompute": "on", "lr": 0.01, "parts": parts}
        folder = tmp_path / str(processes)
        folder.mkdir()
        settings = spec.settings.model_copy(update=update)
        given = replace(spec, settings=settings, work_dir=folder, world_size=processes)
        if processes == 1:
            train(given)
            continue
        given = replace(given, settings=settings.model_copy(update={"strategy": strategy}))
        write_spec(given, folder / "spec.json")
        ranks = [sys.executable, "-m", "tasks.training.ranks", "--processes", "2"]
        command = [*ranks, "--spec", str(folder / "spec.json")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (tensors(replace(spec, work_dir=tmp_path / name)) for name in ("1", "2"))
    assert one.keys() == two.keys()
    assert {part_of(name) for name, value in two.items() if ".lora_B." in name and value.any()} == set(parts)
    assert max(abs(one[name] - two[name]).max() for name in one) < 1e-5
    left = [json.loads((tmp_path / name / "history.json").read_text()) for name in ("1", "2")]
    assert left[0]["facts"]["images"] == left[1]["facts"]["images"] == 3
    measured = [[entry["measured"]["loss"] for entry in of["history"] if "measured" in entry] for of in left]
    assert measured[0] == pytest.approx(measured[1], abs=1e-5)


def test_parts_that_the_start_does_not_have_are_refused(spec: Spec, tmp_path: Path) -> None:
    train(replace(spec, settings=spec.settings.model_copy(update={"parts": ["language"]})))
    start = write_folder(spec.work_dir / "adapter", str(tmp_path / "stored"), "adapter/1", 1, {})
    train(replace(spec, start=start))  # by default, of language and merger what there is
    assert {part_of(name) for name in tensors(spec)} == {"language"}
    for parts in (["language", "vision"], ["merger"]):
        with pytest.raises(TrainingError, match=rf"no LoRA of {parts[-1]}, only of language: choose parts among these"):
            train(replace(spec, start=start, settings=spec.settings.model_copy(update={"parts": parts})))


def test_a_model_that_reads_alone_is_not_shown_images(spec: Spec, model: Path) -> None:
    with pytest.raises(TrainingError, match=r"no model of the Qwen-VL series.*observation text"):
        train(replace(spec, model=str(model)))


def test_a_row_with_a_text_that_would_be_seen_as_an_image_is_set_aside(spec: Spec, root: Path) -> None:
    forged, sound = shown("How long?", "warranty", 0), shown("How wide?", "width", 1)
    forged["prompt"][1]["content"] += " <|image_pad|>"
    tokenizer, sight = load_tokenizer(spec.model), Sight(Path(spec.model), str(root))
    items = sft.load([forged, sound], tokenizer, spec.settings, sight)
    assert (len(items.train), items.set_aside) == (1, {"a text holds an image's token": 1})
    pair, other = (
        {**row, "chosen": row["completion"], "rejected": [{"role": "assistant", "content": "<search>it</search>"}]}
        | {"chosen_score": 1.0, "rejected_score": 0.0}
        for row in (forged, sound)
    )
    items = dpo.load([pair, other], tokenizer, spec.settings.model_copy(update={"method": "dpo"}), sight)
    assert (len(items.train), items.set_aside) == (1, {"a text holds an image's token": 1})


def test_merged_it_sees_what_base_and_adapter_see(spec: Spec, root: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    parts: list[Part] = ["language", "merger", "vision"]
    train(replace(spec, settings=spec.settings.model_copy(update={"parts": parts, "lr": 0.05, "epochs": 4})))
    facts = {"base_fingerprint": model_fingerprint(Path(spec.model))}
    adapter = write_folder(spec.work_dir / "adapter", str(tmp_path / "stored"), "adapter/1", 1, facts)
    merged = fetch_folder(merge(adapter, spec.model, str(tmp_path / "merged")))
    sight = Sight(merged, str(root))
    ids = torch.tensor([[5, sight.token_id, 6]])
    tokens = sight.tokens(page(0))
    ids = torch.tensor([[5, *[sight.token_id] * len(tokens), 6]])
    given = {"input_ids": ids, "mm_token_type_ids": (ids == sight.token_id).int(), **sight.inputs([0])}
    with torch.no_grad():
        both = PeftModel.from_pretrained(load_model(spec.model, bf16=False), fetch_folder(adapter))(**given).logits
        alone = load_model(merged, bf16=False)(**given).logits
        base = load_model(spec.model, bf16=False)(**given).logits
    assert (both - alone).abs().max() < 1e-4 < 0.01 < (both - base).abs().max()
