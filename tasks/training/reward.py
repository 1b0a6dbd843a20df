"""A reward model: (question, query) → a score that grows with the rank score, by a scalar head in place of the vocabulary.

The score is read where the query ends: behind its last token, where a language model would say that the turn is over. An item is
a question with all its queries, whose common beginning is computed once. Learned by (`reward_loss`)

    regression  (r − s)², with r the model's score and s the rank score: r estimates s
    pairs       −log σ(r_better − r_worse), over all pairs of a question's queries with different rank scores: r orders queries.
                The model of Bradley and Terry (1952), as Ouyang et al. 2022 train it ("Training language models to follow
                instructions with human feedback", equation 1), all comparisons of a prompt in one batch.

A step's loss is the mean over its queries; or over its pairs, in which every question counts alike, however many pairs it has
(the factor before the sum of that equation).
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby, permutations
from typing import Any

import torch

from tasks.config import Finetune
from tasks.training.examples import Example, Item, Items, Pair, Row, encode, unusable
from tasks.training.method import Batch, Columns, compared, mean
from tasks.training.sight import Sight
from tasks.training.weights import with_mean_one

SCALAR, REFERENCE = True, False


def load(rows: Sequence[Row], tokenizer: Any, settings: Finetune, sight: Sight | None = None) -> Items:
    """Tokenize rows of reward/3, one item a question.

    Set aside are queries with more than `max_length` tokens ("too long"); and, where pairs are learned, those to learn from
    whose question's queries all scored alike ("all alike"). Measured on are all, as by regression.
    """
    aside: Counter[str] = Counter()
    found: dict[str, list[Item]] = {"train": [], "val": []}
    for (split, _), group in groupby(sorted(rows, key=_place), key=_place):
        kept: dict[Example, float] = {}
        for row in group:
            example = example_of(row, tokenizer)
            if reason := unusable(example, settings.max_length):
                aside[reason] += 1
            else:
                kept[example] = row["score"]
        scores = tuple(kept.values())
        pairs = _pairs(scores) if settings.reward_loss == "pairs" else ()
        if kept and settings.reward_loss == "pairs" and not pairs and split == "train":
            aside["all alike"] += len(kept)
        elif kept:
            found[split].append(Item(tuple(kept), pairs, scores))
    return Items(with_mean_one(found["train"]), found["val"], dict(aside))


def _place(row: Row) -> tuple[str, str]:
    return row["split"], row["question_id"]


def _pairs(scores: Sequence[float]) -> tuple[Pair, ...]:
    gaps = {(i, j): scores[i] - scores[j] for i, j in permutations(range(len(scores)), 2)}
    ordered = {pair: gap for pair, gap in gaps.items() if gap > 0}
    return tuple(Pair(i, j, gap, weight=1 / len(ordered)) for (i, j), gap in ordered.items())


def example_of(row: Row, tokenizer: Any) -> Example:
    """A query to score, from its prompt and completion: its last token is where the score is read."""
    (example,) = encode({**row, "tools": None}, tokenizer, "assistant")
    return Example(example.ids, (len(example.ids) - 1,))


def terms(items: Sequence[Item], batch: Batch, settings: Finetune) -> Batch:
    """The scores, [E], and the batch's pairs where they are learned."""
    scores = torch.tensor([score for item in items for score in item.scores])
    if settings.reward_loss == "pairs":
        return compared(items) | {"scores": scores}
    return {"scores": scores, "weights": torch.ones(len(scores))}


def columns(logits: torch.Tensor, batch: Batch, settings: Finetune, reference: torch.Tensor | None) -> Columns:
    """The model's score of each query, [E], and the loss of each query or pair."""
    given = torch.zeros_like(logits[:, 0]).index_copy(0, batch["owners"], logits[:, 0]).float()
    if settings.reward_loss == "pairs":
        loss = -torch.nn.functional.logsigmoid(given[batch["better"]] - given[batch["worse"]])
    else:
        loss = (given - batch["scores"]).square()
    return {"loss": loss, "score": given}


def metrics(items: Sequence[Item], measured: Mapping[str, Sequence[float]]) -> dict[str, float | None]:
    """The mean loss; Spearman's ρ and Kendall's τ of the model's scores with the rank scores, over all queries, and as the mean
    over questions whose queries did not all score alike.

    A correlation is null where all scores are alike.
    """
    given = iter(measured["score"])
    both = [(list(item.scores), [next(given) for _ in item.scores]) for item in items]
    whole = [[score for question in both for score in question[side]] for side in (0, 1)]
    losses = measured["loss"]
    weights = [pair.weight for item in items for pair in item.pairs] or [1.0] * len(losses)
    told: dict[str, float | None] = {"loss": _weighted(losses, weights) if losses else None}
    for name in ("spearman", "kendall"):
        within = [found for scores, own in both if (found := _correlation(name, scores, own)) is not None]
        told[name] = _correlation(name, *whole)
        told[f"{name}_within"] = mean(within) if within else None
    return told


def _weighted(values: Sequence[float], weights: Sequence[float]) -> float:
    return math.fsum(weight * value for weight, value in zip(weights, values, strict=True)) / math.fsum(weights)


def _correlation(name: str, scores: Sequence[float], given: Sequence[float]) -> float | None:
    """A rank correlation in which ties count as ties (Kendall's τ_b); null where one side has only one value.

    A model that cannot tell the queries of a question apart is right about none of them: 0.
    """
    from scipy import stats

    if len(set(scores)) < 2:
        return None
    if len(set(given)) < 2:
        return 0.0
    return float(stats.spearmanr(scores, given)[0] if name == "spearman" else stats.kendalltau(scores, given)[0])
