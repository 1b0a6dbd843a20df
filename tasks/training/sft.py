"""Supervised finetuning: the tokens of what worked are made more likely.

The loss of an optimizer step is Σ weight · −log p(token) / N over its N learned tokens.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tasks.config import Finetune
from tasks.training.examples import MISTAKABLE, Example, Item, Items, Row, encode, mistakable, unusable
from tasks.training.method import Batch, Columns, mean
from tasks.training.sight import Sight
from tasks.training.weights import SCHEMES, with_mean_one

SCALAR, REFERENCE = False, False


def load(rows: Sequence[Row], tokenizer: Any, settings: Finetune, sight: Sight | None = None) -> Items:
    """Tokenize rows of sft/2, one item a sequence.

    Set aside are sequences with more than `max_length` tokens ("too long"), without a token to learn under the mask strategy
    ("nothing to learn"), rows to learn from that weigh 0 ("weight 0"), and those with a text that the model would see as an
    image. Those to measure on all weigh 1.
    """
    aside: Counter[str] = Counter()

    def items(row: Row, weight: float) -> list[Item]:
        kept: list[Item] = []
        if mistakable([*row["prompt"], *row["completion"]], tokenizer, sight):
            aside[MISTAKABLE] += 1
            return kept
        for example in encode(row, tokenizer, settings.mask_strategy, weight, sight):
            if reason := unusable(example, settings.max_length):
                aside[reason] += 1
            else:
                kept.append(Item((example,)))
        return kept

    train: list[Item] = []
    for row in (row for row in rows if row["split"] == "train"):
        if weight := SCHEMES[settings.weight_scheme](row):
            train += items(row, weight)
        else:
            aside["weight 0"] += 1
    val = [item for row in rows if row["split"] != "train" for item in items(row, 1.0)]
    return Items(with_mean_one(train), val, dict(aside))


def terms(items: Sequence[Item], batch: Batch, settings: Finetune) -> Batch:
    """The weight of each learned token, [N]."""
    examples: list[Example] = [item.examples[0] for item in items]
    return {"weights": torch.tensor([examples[owner].weight for owner in batch["owners"].tolist()])}


def columns(logits: torch.Tensor, batch: Batch, settings: Finetune, reference: torch.Tensor | None) -> Columns:
    """−log p of each learned token, [N]."""
    return {"loss": torch.nn.functional.cross_entropy(logits.float(), batch["labels"], reduction="none")}


def metrics(items: Sequence[Item], measured: Mapping[str, Sequence[float]]) -> dict[str, float | None]:
    """The mean loss over all learned tokens."""
    return {"loss": mean(measured["loss"])}
