"""A model that sees images too is trained on text: its language model alone, packed like any other."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tasks.training.batches import lay_out
from tasks.training.examples import Example, Item
from tasks.training.loading import load_model, lora_modules
from tests.tiny_model import tiny_tokenizer


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-VL, randomly initialised."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    folder = tmp_path_factory.mktemp("seeing")
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [16, 8, 8], "mrope_interleaved": True}
    text = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"vocab_size": 1024, "num_key_value_heads": 1, "head_dim": 64, "rope_parameters": rope}
    vision = {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 128}
    vision |= {"patch_size": 16, "deepstack_visual_indexes": [0], "num_position_embeddings": 64}
    torch.manual_seed(0)
    Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_only_its_language_model_learns(seeing: Path) -> None:
    model = get_peft_model(load_model(seeing, bf16=False), LoraConfig(**lora_modules(load_model(seeing, bf16=False))))
    adapted = set(model.base_model.targeted_module_names)
    assert all(name.startswith("model.language_model.layers.") for name in adapted)
    assert len(adapted) == 2 * 7


@pytest.mark.parametrize("batching", ["length-grouped", "packing"])
def test_packed_it_computes_each_example_as_if_alone(seeing: Path, batching: str) -> None:
    rng, network = random.Random(0), load_model(seeing, bf16=False).eval()
    prefix = tuple(rng.randrange(900) for _ in range(12))
    examples = [Example(prefix + tuple(rng.randrange(900) for _ in range(n)), (12 + n - 1,)) for n in (5, 9, 30)]
    batch = lay_out([Item((example,)) for example in examples], batching, torch.float32)
    inputs: dict[str, Any] = {k: batch[k] for k in ("input_ids", "position_ids", "attention_mask") if k in batch}
    with torch.no_grad():
        found = network(**inputs).logits.flatten(0, 1)[batch["positions"]]
        alone = {e.ids[-1]: network(input_ids=torch.tensor([e.ids])).logits[0, -2] for e in examples}
    assert len(found) == len(examples)
    for logits, label in zip(found, batch["labels"].tolist(), strict=True):
        assert (logits - alone[label]).abs().max() < 1e-4
