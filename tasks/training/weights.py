"""How much each training example counts.

    none         1
    rank-score   s, the rank score of its search: (k − rank + 1) / k, or what the reward says that `process` was given
    rank-sq      s²
    inv-effort   1 / (1 + x), where x = 1 − effort score is the share of positions looked at before the page was found;
                 0 when it was never found
    binary       1 when the page was at rank 1, else 0

The weights are then divided by the mean of those above 0, which are the examples that are trained on: the mean weight is 1,
so a scheme changes how much examples count against each other, not the size of the steps.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any


def _inverse_effort(row: Mapping[str, Any]) -> float:
    return 1 / (2 - row["effort"]) if row["effort"] else 0.0


SCHEMES: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "none": lambda row: 1.0,
    "rank-score": lambda row: row["rank_score"] or 0.0,
    "rank-sq": lambda row: (row["rank_score"] or 0.0) ** 2,
    "inv-effort": _inverse_effort,
    "binary": lambda row: float(row["gt_rank"] == 1),
}


def weigh(rows: Sequence[Mapping[str, Any]], scheme: str) -> list[float]:
    """One weight for each row of sft/2, with mean 1 over those above 0; all 0 when none is."""
    raw = [SCHEMES[scheme](row) for row in rows]
    counted = [weight for weight in raw if weight > 0]
    mean = sum(counted) / len(counted) if counted else 1.0
    return [weight / mean for weight in raw]
