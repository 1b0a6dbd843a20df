"""The one place for reward: pure functions over (results, answer locations).

Filtering, sample weights, preference pairs and evaluation all call these. A page is (file, page number from 1); every
answer location counts, so the rank of a search is that of its best-ranked answer location.

What a search scores is a choice, `REWARDS`: a function, and a line there. Its rank scores decide which search of a rollout is
the best, what is kept, which of two queries is preferred and by what margin, how much an example weighs, and what a reward
model learns.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tasks.config import RewardName

Page = tuple[str, int]
Reward = Callable[[Sequence[int], int, int], float]
"""(ranks of `gt_ranks` within k, number of answer locations, at least 1, k) → the rank score: 0 when none was found, to 1."""


def pages_wanted(row: Mapping[str, Any]) -> list[Page]:
    """The answer locations of a question, rollout or result, as it stands in a row."""
    return [(place["document"], place["page"]) for place in row["answer_locations"] or ()]


def pages_found(search: Mapping[str, Any]) -> list[Page]:
    """What a search found, best first, as it stands in a row."""
    return [(hit["file"], hit["page_number"]) for hit in search["results"] or ()]


def gt_rank(results: Sequence[Page], answer_locations: Iterable[Page]) -> int | None:
    """Rank, from 1, of the first result that is an answer location; None when there is none.

    >>> gt_rank([("a.pdf", 3), ("b.pdf", 1)], [("b.pdf", 1), ("c.pdf", 9)])
    2
    """
    return next(iter(gt_ranks(results, answer_locations)), None)


def gt_ranks(results: Sequence[Page], answer_locations: Iterable[Page]) -> list[int]:
    """Ranks, from 1 and rising, of all answer locations among the results; a page counts where it comes first.

    >>> gt_ranks([("a.pdf", 3), ("b.pdf", 1), ("c.pdf", 9)], [("c.pdf", 9), ("a.pdf", 3), ("d.pdf", 1)])
    [1, 3]
    """
    wanted, ranks = set(answer_locations), []
    for rank, page in enumerate(results, start=1):
        if page in wanted:
            wanted.remove(page)
            ranks.append(rank)
    return ranks


def rank_score(rank: int | None, k: int) -> float:
    """(k − rank + 1) / k, and 0 when the page is not among the first k (reference pipeline, "Normalized Rank Score").

    >>> [round(rank_score(r, 3), 2) for r in (1, 2, 3, 4, None)]
    [1.0, 0.67, 0.33, 0.0, 0.0]
    """
    return 0.0 if rank is None or rank > k else (k - rank + 1) / k


def first_success(ranks: Sequence[int | None]) -> int | None:
    """Number, from 1, of the first search that found an answer location; None when none did."""
    return next((step for step, rank in enumerate(ranks, start=1) if rank is not None), None)


def best_search(scores: Sequence[float]) -> int | None:
    """Index, from 0, of the search with the highest score, the earliest of equals; None when none scores above 0."""
    best = max(range(len(scores)), key=scores.__getitem__, default=None)
    return None if best is None or scores[best] <= 0 else best


def effort_score(ranks: Sequence[int | None], k: int) -> float:
    """How little had to be looked at before the page was found: k / (k + positions seen − 1), and 0 when it never was.

    Positions seen are the k of each search before the first hit, and those of that search up to and with the hit: what comes
    after it changes nothing. Found at once at rank 1 gives 1, first in the second search 1/2, first in the third 1/3.

    >>> effort_score([None, 2], k=4)
    0.4444444444444444
    """
    step = first_success(ranks)
    if step is None:
        return 0.0
    rank = ranks[step - 1]
    assert rank is not None
    seen = (step - 1) * k + rank
    return k / (k + seen - 1)


def reciprocal_rank(rank: int | None) -> float:
    """1 / rank, a miss counting 0 (Voorhees, TREC-8 QA track, 1999)."""
    return 0.0 if rank is None else 1 / rank


def hit_at(rank: int | None, k: int) -> float:
    """1 when the page was among the first k, else 0."""
    return float(rank is not None and rank <= k)


def recall_at(ranks: Sequence[int], wanted: int, k: int) -> float:
    """Share of the answer locations that are among the first k; with one location this is `hit_at`.

    Args:
        ranks: of `gt_ranks`.
        wanted: how many answer locations there are, at least 1.
    """
    return sum(rank <= k for rank in ranks) / wanted


def ndcg_at(ranks: Sequence[int], wanted: int, k: int) -> float:
    """Normalised discounted cumulated gain of the first k, a page being relevant or not; 1 when no order could be better.

    Σ 1 / log2(1 + rank) over the answer locations among the first k, divided by the same sum when they are on top
    (Järvelin and Kekäläinen, Cumulated Gain-Based Evaluation of IR Techniques, 2002; with the discount of Burges et al.,
    Learning to Rank Using Gradient Descent, 2005, which tells rank 1 from rank 2).

    Args:
        ranks: of `gt_ranks`.
        wanted: how many answer locations there are, at least 1.

    >>> ndcg_at([1, 3], wanted=2, k=3)
    0.9197207891481876
    """
    best = math.fsum(1 / math.log2(1 + rank) for rank in range(1, min(wanted, k) + 1))
    return math.fsum(1 / math.log2(1 + rank) for rank in ranks if rank <= k) / best


def in_order_seen(searches: Iterable[Sequence[Page]]) -> list[Page]:
    """The pages of several searches as one ranking: in the order in which they first came, each once."""
    return list(dict.fromkeys(page for results in searches for page in results))


def set_f1(predicted: Iterable[object], wanted: Iterable[object]) -> tuple[float, float, float]:
    """Precision, recall and F1 of a set of citations; nothing predicted gives 0 precision, recall and F1."""
    got, true = set(predicted), set(wanted)
    right = len(got & true)
    if not right:
        return 0.0, 0.0, 0.0
    precision, recall = right / len(got), right / len(true)
    return precision, recall, 2 * precision * recall / (precision + recall)


REWARDS: dict[RewardName, Reward] = {
    "linear": lambda ranks, wanted, k: rank_score(min(ranks, default=None), k),
    "reciprocal": lambda ranks, wanted, k: reciprocal_rank(min(ranks, default=None)),
    "ndcg": ndcg_at,
}


def score(name: RewardName, results: Sequence[Page], answer_locations: Iterable[Page], k: int) -> float:
    """The rank score of a search by a reward, its first k results counting.

    >>> results, wanted = [("a.pdf", 3), ("b.pdf", 1), ("c.pdf", 9)], [("b.pdf", 1), ("c.pdf", 9)]
    >>> [round(score(name, results, wanted, 3), 2) for name in REWARDS]
    [0.67, 0.5, 0.69]
    """
    wanted = set(answer_locations)
    return REWARDS[name](gt_ranks(results[:k], wanted), len(wanted), k) if wanted else 0.0
