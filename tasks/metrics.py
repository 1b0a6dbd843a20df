"""What is measured of a question: every metric, with its name, its meaning and its parts.

Retrieval metrics count all questions, a miss counting 0. The few that cannot (a step number exists only where the page was
found) say so in their names and are never compared: a run that gives up on hard questions would look better for it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from tasks.agent.trajectory import Failure
from tasks.fate import is_right
from tasks.reward import hit_at, ndcg_at, pages_wanted, recall_at, reciprocal_rank

Row = Mapping[str, Any]
HEADLINE = "hit_at_1"
HIT_DEPTHS = (1, 3, 5, 10)
LIST_DEPTHS = (3, 5, 10)  # at 1 they say what Hit@1 says
FAILURES: frozenset[str] = frozenset(get_args(Failure))


@dataclass(frozen=True)
class Metric:
    """What is measured: per question a numerator and a denominator, or None where a run has no such thing.

    `compared` metrics count every question, so two runs may be judged by them; more is better in all of these.
    """

    name: str
    label: str
    kind: Literal["share", "number", "seconds"]
    compared: bool
    parts: Callable[[Row], tuple[float, float] | None]
    meaning: str
    estimated: bool = True  # a count of what happened has no interval


def _hit(k: int) -> Metric:
    return Metric(
        f"hit_at_{k}",
        f"Hit@{k}",
        "share",
        True,
        lambda row: (hit_at(row["first_rank"], k), 1),
        f"first search: a page with the answer is among the first {k}",
    )


def _best_hit(k: int) -> Metric:
    return Metric(
        f"best_hit_at_{k}",
        f"Hit@{k}, best search",
        "share",
        False,  # "success" and "mrr_best" judge the best search
        lambda row: (hit_at(row["best_rank"], k), 1) if row["best_known"] else None,
        f"each question's best search: a page with the answer is among the first {k}",
    )


def wanted(row: Row) -> int:
    """How many pages hold the answer."""
    return len(set(pages_wanted(row)))


def _over_all(
    measure: Callable[[Sequence[int], int, int], float], column: str, k: int
) -> Callable[[Row], tuple[float, float] | None]:
    """A measure of the ranks of all pages with the answer, such as `reward.recall_at`; none where no page is known."""

    def parts(row: Row) -> tuple[float, float] | None:
        pages = wanted(row)
        return (measure(row[column], pages, k), 1) if pages and row[column] is not None else None

    return parts


def _recall(k: int) -> Metric:
    return Metric(
        f"recall_at_{k}",
        f"Recall@{k}",
        "share",
        k == LIST_DEPTHS[-1],
        _over_all(recall_at, "first_ranks", k),
        f"first search: share of all pages with the answer that are among the first {k}",
    )


def _ndcg(k: int) -> Metric:
    return Metric(
        f"ndcg_at_{k}",
        f"nDCG@{k}",
        "share",
        k == LIST_DEPTHS[-1],
        _over_all(ndcg_at, "first_ranks", k),
        f"first search: how near the pages with the answer are to the top of the first {k}; 100 % when all are on top "
        "(Järvelin and Kekäläinen, 2002)",
    )


def _each(column: str) -> Callable[[Row], tuple[float, float] | None]:
    return lambda row: None if row[column] is None else (row[column], 1)


def _rate(part: str, whole: str) -> Callable[[Row], tuple[float, float] | None]:
    return lambda row: (row[part], row[whole]) if row[part] is not None and row[whole] else None


METRICS: tuple[Metric, ...] = (
    *(_hit(k) for k in HIT_DEPTHS),
    Metric(
        "mrr_first",
        "MRR, first search",
        "share",
        True,
        lambda row: (reciprocal_rank(row["first_rank"]), 1),
        "mean of 1 / rank over all questions, a miss counting 0, as does a page below the depth to which searches are ranked",
    ),
    Metric(
        "mrr_best",
        "MRR, best search",
        "share",
        True,
        lambda row: (reciprocal_rank(row["best_rank"]), 1) if row["best_known"] else None,
        "the same of each question's best search",
    ),
    *(_best_hit(k) for k in HIT_DEPTHS),
    Metric(
        "success",
        "Success rate, any search",
        "share",
        True,
        lambda row: (float(row["searches_to_success"] is not None), 1) if row["best_known"] else None,
        "a page with the answer was among the results that the agent was shown",
    ),
    *(_recall(k) for k in LIST_DEPTHS),
    *(_ndcg(k) for k in LIST_DEPTHS),
    Metric(
        "recall_seen",
        "Recall, all searches",
        "share",
        True,
        _over_all(lambda ranks, pages, _: len(ranks) / pages, "seen_ranks", 0),
        "share of all pages with the answer that any search returned",
    ),
    Metric(
        "ndcg_seen",
        "nDCG@10, all searches",
        "share",
        True,
        _over_all(ndcg_at, "seen_ranks", 10),
        "the same as nDCG@10, of the pages in the order in which searches first returned them",
    ),
    Metric(
        "correct",
        "Answers right",
        "share",
        True,
        lambda row: None if row["anls"] is None else (float(is_right(row["anls"])), 1),
        "share of questions whose answer has an ANLS* above 0.5",
    ),
    Metric(
        "anls", "Answer, ANLS*", "share", True, _each("anls"), "likeness of the answer to the nearest reference answer"
    ),
    Metric(
        "page_f1",
        "Citation F1, pages",
        "share",
        True,
        _each("page_f1"),
        "cited pages against the pages with the answer",
    ),
    Metric(
        "page_precision",
        "Citation precision, pages",
        "share",
        False,
        _each("page_precision"),
        "share of cited pages that hold the answer",
    ),
    Metric(
        "page_recall",
        "Citation recall, pages",
        "share",
        False,
        _each("page_recall"),
        "share of pages with the answer that were cited",
    ),
    Metric("document_f1", "Citation F1, documents", "share", True, _each("document_f1"), "the same for documents"),
    Metric(
        "document_precision",
        "Citation precision, documents",
        "share",
        False,
        _each("document_precision"),
        "share of cited documents that hold the answer",
    ),
    Metric(
        "document_recall",
        "Citation recall, documents",
        "share",
        False,
        _each("document_recall"),
        "share of documents with the answer that were cited",
    ),
    Metric(
        "cited_seen",
        "Citations of pages seen",
        "share",
        False,
        _rate("cited_seen", "cited"),
        "of all pages cited, those that a search of the rollout had shown the model",
    ),
    Metric(
        "fabricated",
        "Fabricated citations a question",
        "number",
        False,
        lambda row: None if row["cited_seen"] is None else (row["cited"] - row["cited_seen"], 1),
        "pages cited that no search of the rollout had shown the model",
    ),
    Metric(
        "zero_results",
        "Searches that match nothing",
        "share",
        False,
        _rate("zero_results", "searches"),
        "of all searches made",
    ),
    Metric(
        "valid_turns",
        "Turns with a valid action",
        "share",
        False,
        _rate("valid_turns", "turns"),
        "of all model calls: a search or an answer that could be read",
    ),
    Metric(
        "failed",
        "Rollouts that failed",
        "share",
        False,
        lambda row: None if row["outcome"] is None else (float(row["outcome"] in FAILURES), 1),
        "through no fault of the model, such as a lost connection; they count as misses",
        estimated=False,
    ),
    Metric("calls", "Model calls a question", "number", False, _each("turns"), "turns taken"),
    Metric(
        "searches",
        "Searches a question",
        "number",
        False,
        lambda row: (row["searches"], 1) if row["best_known"] else None,
        "searches made",
    ),
    Metric(
        "searches_to_success",
        "Iterations to success (found only)",
        "number",
        False,
        lambda row: (row["searches_to_success"], 1) if row["best_known"] and row["searches_to_success"] else None,
        "number of the first search that found the page, over questions where one did",
    ),
    Metric(
        "calls_to_success",
        "Model calls to success (found only)",
        "number",
        False,
        _each("calls_to_success"),
        "model calls up to that whose search first found the page, over questions where one did",
    ),
    Metric(
        "first_hit_rank",
        "First-hit rank (found only)",
        "number",
        False,
        _each("first_hit_rank"),
        "rank of the page in the first search that found it, over questions where one did",
    ),
    Metric(
        "mrr_survivors",
        "mrr_survivors (reference)",
        "share",
        False,
        lambda row: (reciprocal_rank(row["first_rank"]), 1) if row["searches_to_success"] == 1 else None,
        "the reference pipeline's MRR: over questions whose first search found it among the top_k pages that the agent saw, "
        "so not comparable between runs",
    ),
    Metric(
        "prompt_tokens",
        "Prompt tokens a question",
        "number",
        False,
        _each("prompt_tokens"),
        "tokens sent, all turns, where the server told",
    ),
    Metric(
        "completion_tokens",
        "Generated tokens a question",
        "number",
        False,
        _each("completion_tokens"),
        "tokens generated, all turns, where the server told",
    ),
    Metric(
        "seconds",
        "Seconds a question",
        "seconds",
        False,
        _each("elapsed_s"),
        "wall time of a rollout, with others beside it",
    ),
)
BY_NAME = {metric.name: metric for metric in METRICS}
# The same where no run made a second search, and where one page has the answer.
TWINS = {
    "mrr_best": "mrr_first",
    **{f"best_hit_at_{k}": f"hit_at_{k}" for k in HIT_DEPTHS},
    **{f"recall_at_{k}": f"hit_at_{k}" for k in LIST_DEPTHS},
}


def show(metric: str, value: float) -> str:
    """A value as people read it: shares as percentages with one decimal."""
    kind = BY_NAME[metric].kind
    if kind == "share":
        return f"{100 * value:.1f} %"
    if kind == "seconds":
        return f"{value:.2f} s"
    return f"{value:.0f}" if value >= 100 else f"{value:.2f}"


def show_interval(metric: str, low: float | None, high: float | None, *, signed: bool = False) -> str:
    """ "[27.9, 44.1]"; nothing where there are too few groups for one."""
    if low is None or high is None or math.isnan(low) or math.isnan(high):
        return ""
    scale, digits = (100, 1) if BY_NAME[metric].kind == "share" else (1, 0 if high >= 100 else 2)
    sign = "+" if signed else ""
    return f"[{scale * low:{sign}.{digits}f}, {scale * high:{sign}.{digits}f}]".replace("-", "−")
