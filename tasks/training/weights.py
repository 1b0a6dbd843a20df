"""How much each training example counts.

    none         1
    rank-score   s, the rank score of its search: (k − rank + 1) / k, or what the reward says that `process` was given
    rank-sq      s²
    inv-effort   1 / (1 + x), where x = 1 − effort score grows with the positions looked at before the page was found; 0 when
                 it was never found
    binary       1 when the page was at rank 1, else 0

What weighs 0 is set aside. The weights of what is then trained on are divided by their mean, so that a scheme changes how much
examples count against each other, not the size of the steps.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tasks.training.examples import Item


def _inverse_effort(row: Mapping[str, Any]) -> float:
    return 1 / (2 - row["effort"]) if row["effort"] else 0.0


SCHEMES: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "none": lambda row: 1.0,
    "rank-score": lambda row: row["rank_score"] or 0.0,
    "rank-sq": lambda row: (row["rank_score"] or 0.0) ** 2,
    "inv-effort": _inverse_effort,
    "binary": lambda row: float(row["gt_rank"] == 1),
}


def with_mean_one(items: Sequence[Item]) -> list[Item]:
    """The items, the weights of their pairs, or of their examples where nothing is compared, divided by these weights' mean."""
    weights = [part.weight for item in items for part in item.pairs or item.examples]
    mean = math.fsum(weights) / len(weights) if weights else 1.0

    def scaled(item: Item) -> Item:
        if item.pairs:
            return replace(item, pairs=tuple(replace(pair, weight=pair.weight / mean) for pair in item.pairs))
        return replace(item, examples=tuple(replace(one, weight=one.weight / mean) for one in item.examples))

    return list(map(scaled, items))
