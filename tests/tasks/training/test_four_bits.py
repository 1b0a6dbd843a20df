"""QLoRA: the frozen weights in four bits, by bitsandbytes, which computes on a CPU what it computes on a GPU."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tasks.artifact import Artifact, read_rows, table_of, write_table
from tasks.config import Finetune
from tasks.errors import TrainingError
from tasks.training.loading import load_model
from tasks.training.parts import part_of
from tasks.training.spec import Spec, write_spec
from tasks.training.train import train
from tests.tasks.training.pictures import shown

FOUR_BITS = Finetune(epochs=3, lr=1e-2, quantize="4bit")


@pytest.fixture
def spec(training_set: Artifact, model: Path, tmp_path: Path) -> Spec:
    return Spec("training", training_set, str(model), "tiny", False, FOUR_BITS, tmp_path, 1, None)


def _trained(spec: Spec, name: str, **changes: Any) -> tuple[dict[str, Any], list[float]]:
    """The adapter's weights and the losses of a training in a folder of its own."""
    from safetensors.numpy import load_file

    folder = spec.work_dir / name
    folder.mkdir()
    train(replace(spec, work_dir=folder, **changes))
    history = json.loads((folder / "history.json").read_text())["history"]
    return load_file(folder / "adapter" / "adapter_model.safetensors"), [e["loss"] for e in history if "loss" in e]


@pytest.mark.parametrize("base", ["model", "vlm"])
def test_layers_are_held_in_four_bits_and_compute_nearly_the_same(base: str, request: pytest.FixtureRequest) -> None:
    import torch

    folder = request.getfixturevalue(base)
    whole, held = load_model(folder, bf16=False), load_model(folder, bf16=False, quantize="4bit")
    language = {name for name, module in held.named_modules() if type(module).__name__ == "Linear4bit"}
    assert {name.rpartition(".")[2] for name in language} >= {"q_proj", "k_proj", "v_proj", "o_proj", "down_proj"}
    for name, module in held.named_modules():
        if name in language:
            # two weights a byte
            assert module.weight.dtype == torch.uint8
            assert 2 * module.weight.numel() == whole.get_submodule(name).weight.numel()
    for name in ("get_input_embeddings", "get_output_embeddings"):
        assert torch.equal(getattr(held, name)().weight, getattr(whole, name)().weight)
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        exact, near = (network(input_ids=ids).logits for network in (whole.eval(), held.eval()))
    assert 0 < (near - exact).norm() / exact.norm() < 0.25


def test_an_adapter_of_four_bit_weights_learns_and_fits_the_whole_ones(spec: Spec) -> None:
    from peft import PeftModel

    adapter, losses = _trained(spec, "four")
    whole, others = _trained(spec, "whole", settings=spec.settings.model_copy(update={"quantize": "none"}))
    assert losses[-1] < losses[0] - 1
    assert losses[0] == pytest.approx(others[0], rel=0.02)
    assert losses[0] != others[0]  # or nothing was quantized
    assert {n: (v.shape, v.dtype) for n, v in adapter.items()} == {n: (v.shape, v.dtype) for n, v in whole.items()}
    adapted = PeftModel.from_pretrained(load_model(spec.model, bf16=False), spec.work_dir / "four" / "adapter")
    assert all(value.isfinite().all() for value in adapted.state_dict().values())


def test_measuring_in_between_changes_nothing_of_what_is_learned(spec: Spec) -> None:
    rows = [row for row in read_rows(spec.training_set) if row["split"] == "train"]
    alone = write_table(table_of(rows, "sft/2"), str(spec.work_dir / "sft.parquet"), "sft/2", {})
    measured, _ = _trained(spec, "measured")
    unmeasured, _ = _trained(spec, "unmeasured", training_set=alone)
    assert max(abs(measured[name] - unmeasured[name]).max() for name in measured) < 1e-6


@pytest.mark.parametrize("method", ["dpo", "reward"])
def test_other_methods_learn_on_four_bits_too(spec: Spec, method: str, pairs: Artifact, scored: Artifact) -> None:
    training_set = pairs if method == "dpo" else scored
    settings = spec.settings.model_copy(update={"method": method})
    adapter, losses = _trained(spec, method, training_set=training_set, settings=settings)
    assert losses[-1] < losses[0]
    assert all(abs(value).max() > 0 for name, value in adapter.items() if "lora_B" in name)


def test_every_part_of_a_model_that_sees_learns_on_four_bits(spec: Spec, vlm: Path, root: Path) -> None:
    rows = [shown("How long?", "pump", 0, 1), shown("How long?", "the pump", 1, 2)]
    stored = write_table(table_of(rows, "sft/2"), str(spec.work_dir / "seen.parquet"), "sft/2", {})
    settings = spec.settings.model_copy(update={"parts": ["language", "merger", "vision"], "epochs": 6})
    seen = replace(spec, model=str(vlm), training_set=stored, images_root=str(root), settings=settings)
    adapter, losses = _trained(seen, "seen")
    assert losses[-1] < losses[0]
    moved = {part_of(name) for name, value in adapter.items() if "lora_B" in name and abs(value).max() > 0}
    assert moved == {"language", "merger", "vision"}


def test_two_processes_learn_on_four_bits_what_one_learns(spec: Spec) -> None:
    from safetensors.numpy import load_file

    update = {"bf16": False, "epochs": 1, "batch_size": 3}
    alone, _ = _trained(spec, "one", settings=spec.settings.model_copy(update=update | {"gradient_accumulation": 2}))
    folder = spec.work_dir / "two"
    folder.mkdir()
    settings = spec.settings.model_copy(update=update | {"gradient_accumulation": 1})
    write_spec(replace(spec, settings=settings, work_dir=folder, world_size=2), folder / "spec.json")
    ranks = [sys.executable, "-m", "tasks.training.ranks", "--processes", "2", "--spec", str(folder / "spec.json")]
    done = subprocess.run(ranks, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    together = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert max(abs(alone[name] - together[name]).max() for name in alone) < 1e-4


def test_without_bitsandbytes_it_says_what_to_do(spec: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(TrainingError, match=r"pip install 'drag\[train,qlora\]', or take --quantize none"):
        train(spec)
