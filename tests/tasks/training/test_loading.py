"""A model that sees images too is trained on text packed like any other."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.training.batches import lay_out
from tasks.training.examples import Example, Item
from tasks.training.loading import load_model
from tests.tiny_vlm import tiny_vlm


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_vlm(tmp_path_factory.mktemp("seeing"))


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
