"""Direct preference optimization: of two answers to a prompt, the better one is made more likely than the worse one.

With Δ = log π(better)/π₀(better) − log π(worse)/π₀(worse), where π₀ is the model that training starts from, the loss of a pair is

    −log σ(β · Δ − margin_scale · (s_better − s_worse))

with β and margin_scale of the settings, and s the rank scores. Without a margin this is DPO (Rafailov et al. 2023, "Direct
Preference Optimization: Your Language Model is Secretly a Reward Model", equation 7); with one it is ODPO (Amini et al. 2024,
"Direct Preference Optimization with an Offset", equation 8, whose offset is here proportional to the difference of scores).

log π is summed over the tokens that the mask strategy learns. An item is a prompt with all its pairs: the prompt, and a query
that stands in several of them, are computed once. A step's loss is Σ weight · loss / n over its n pairs; a pair weighs what its
better query does.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from tasks.config import Finetune
from tasks.errors import TrainingError
from tasks.training.examples import MISTAKABLE, Example, Item, Items, Pair, Row, encode, mistakable, unusable
from tasks.training.method import Batch, Columns, compared, mean, sums
from tasks.training.sight import Sight
from tasks.training.weights import SCHEMES, with_mean_one

SCALAR, REFERENCE = False, True


def load(rows: Sequence[Row], tokenizer: Any, settings: Finetune, sight: Sight | None = None) -> Items:
    """Tokenize rows of dpo/3, one item a prompt.

    Set aside are pairs of which a side has more than `max_length` tokens ("too long"), none to learn under the mask strategy
    ("nothing to learn"), or the same tokens as the other ("the same"), pairs to learn from that weigh 0 ("weight 0"), and those
    with a text that the model would see as an image. Those to measure on all weigh 1.

    Raises:
        TrainingError: a margin is asked for, and a pair has no scores.
    """
    train_rows = [row for row in rows if row["split"] == "train"]
    aside: Counter[str] = Counter()
    train = _items(train_rows, SCHEMES[settings.weight_scheme], tokenizer, settings, sight, aside)
    val_rows = [row for row in rows if row["split"] != "train"]
    val = _items(val_rows, SCHEMES["none"], tokenizer, settings, sight, aside)
    return Items(with_mean_one(train), val, dict(aside))


def _items(
    rows: Sequence[Row],
    weigh: Callable[[Row], float],
    tokenizer: Any,
    settings: Finetune,
    sight: Sight | None,
    aside: Counter[str],
) -> list[Item]:
    examples: dict[str, dict[Example, int]] = {}  # of each prompt, in the order in which they come
    pairs: dict[str, list[Pair]] = {}
    for row in rows:
        if mistakable([*row["prompt"], *row["chosen"], *row["rejected"]], tokenizer, sight):
            aside[MISTAKABLE] += 1
            continue
        sides = [_example(row, side, tokenizer, settings, sight) for side in ("chosen", "rejected")]
        reasons = [reason for example in sides if (reason := unusable(example, settings.max_length))]
        weight = weigh(row)
        if weight == 0 or reasons or sides[0] == sides[1]:
            aside["weight 0" if weight == 0 else reasons[0] if reasons else "the same"] += 1
            continue
        prompt = json.dumps([row["question_id"], row["prompt"], row["tools"]])
        places = examples.setdefault(prompt, {})
        better, worse = (places.setdefault(example, len(places)) for example in sides)
        pairs.setdefault(prompt, []).append(Pair(better, worse, _gap(row, settings), weight))
    return [Item(tuple(places), tuple(pairs[prompt])) for prompt, places in examples.items()]


def _gap(row: Row, settings: Finetune) -> float:
    """How much better the better query scores; 0 where an imported pair does not say."""
    better, worse = row["chosen_score"], row["rejected_score"]
    if better is not None and worse is not None:
        return better - worse
    if settings.margin_scale > 0:
        raise TrainingError(
            f"a pair of question {row['question_id']} has no scores, which margin_scale counts by: set it to 0, or import "
            "pairs with chosen_score and rejected_score"
        )
    return 0.0


def _example(row: Row, side: str, tokenizer: Any, settings: Finetune, sight: Sight | None = None) -> Example:
    (example,) = encode({**row, "completion": row[side]}, tokenizer, settings.mask_strategy, sight=sight)
    return example


def terms(items: Sequence[Item], batch: Batch, settings: Finetune) -> Batch:
    """The batch's pairs."""
    return compared(items)


def columns(logits: torch.Tensor, batch: Batch, settings: Finetune, reference: torch.Tensor | None) -> Columns:
    """Of each pair its loss, and its margin β · Δ."""
    assert reference is not None
    gained = sums(_log_p(logits, batch) - _log_p(reference, batch), batch)
    margin = settings.beta * (gained[batch["better"]] - gained[batch["worse"]])
    wanted = settings.margin_scale * batch["gaps"]
    return {"loss": -torch.nn.functional.logsigmoid(margin - wanted), "margin": margin}


def _log_p(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    return -torch.nn.functional.cross_entropy(logits.float(), batch["labels"], reduction="none")


def metrics(items: Sequence[Item], measured: Mapping[str, Sequence[float]]) -> dict[str, float | None]:
    """The mean loss of all pairs, their mean margin, and the share of those whose margin is above 0 (accuracy)."""
    margins = measured["margin"]
    return {
        "loss": mean(measured["loss"]),
        "accuracy": mean([float(margin > 0) for margin in margins]),
        "margin": mean(margins),
    }
