"""What a training method is: a module (tasks/training/sft.py, dpo.py, reward.py) that says what is learned and measured.

    SCALAR     whether the model has one score for a head instead of its vocabulary
    REFERENCE  whether the model that training starts from is asked too
    load       rows of the training set → items, some to learn from and some to measure on
    terms      what a batch of items holds beside its tokens (tasks/training/batches.py); of it "weights" [n], one for each of
               the batch's n units (tokens of sft, pairs of dpo, …), which are what a step's loss is a weighted mean over
    columns    what the model, and the reference, say of the learned tokens, [N, vocabulary] or [N, 1] → numbers by name,
               "loss" [n] among them
    metrics    the columns of all items that are measured on → what is told of them, "loss" among it

Everything else (tasks/training/train.py, trainer.py) is the same for all of them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from tasks.config import Finetune
from tasks.training.examples import Item, Items, Row
from tasks.training.sight import Sight

Batch = dict[str, torch.Tensor]
Columns = dict[str, torch.Tensor]


class Method(Protocol):
    """A module as described above."""

    SCALAR: bool
    REFERENCE: bool

    def load(self, rows: Sequence[Row], tokenizer: Any, settings: Finetune, sight: Sight | None = None) -> Items: ...

    def terms(self, items: Sequence[Item], batch: Batch, settings: Finetune) -> Batch: ...

    def columns(
        self, logits: torch.Tensor, batch: Batch, settings: Finetune, reference: torch.Tensor | None
    ) -> Columns: ...

    def metrics(self, items: Sequence[Item], measured: Mapping[str, Sequence[float]]) -> Mapping[str, float | None]: ...


def sums(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Sum of the values of each example's learned tokens, [E]."""
    return values.new_zeros(int(batch["owners"].max()) + 1).index_add(0, batch["owners"], values)


def compared(items: Sequence[Item]) -> Batch:
    """The pairs of a batch: better and worse [n], by their place among the examples of all items; gaps and weights [n]."""
    better: list[int] = []
    worse: list[int] = []
    first = 0
    for item in items:
        better += [first + pair.better for pair in item.pairs]
        worse += [first + pair.worse for pair in item.pairs]
        first += len(item.examples)
    pairs = [pair for item in items for pair in item.pairs]
    return {
        "better": torch.tensor(better, dtype=torch.long),
        "worse": torch.tensor(worse, dtype=torch.long),
        "gaps": torch.tensor([pair.gap for pair in pairs]),
        "weights": torch.tensor([pair.weight for pair in pairs]),
    }


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
