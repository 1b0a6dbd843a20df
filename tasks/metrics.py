"""Results → metrics, each a mean with a 95 % interval.

Retrieval metrics count all questions, a miss counting 0. The few that cannot (a step number exists only where the page was
found) say so in their names and are never compared: a run that gives up on hard questions would look better for it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from tasks import bootstrap
from tasks.agent.trajectory import Failure
from tasks.artifact import Artifact, read_rows
from tasks.errors import InputError
from tasks.reward import hit_at, reciprocal_rank

Row = Mapping[str, Any]
HEADLINE = "hit_at_1"
HIT_DEPTHS = (1, 3, 5, 10)
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


@dataclass(frozen=True)
class Cell:
    """One metric of one run: mean, 95 % bounds (None where nothing can be said) and the questions it counts."""

    metric: str
    run: str
    n: int
    mean: float
    low: float | None
    high: float | None


def _hit(k: int) -> Metric:
    return Metric(
        f"hit_at_{k}",
        f"Hit@{k}",
        "share",
        True,
        lambda row: (hit_at(row["first_rank"], k), 1),
        f"first search: a page with the answer is among the first {k}",
    )


def _each(column: str) -> Callable[[Row], tuple[float, float] | None]:
    return lambda row: None if row[column] is None else (row[column], 1)


def _rate(part: str, whole: str) -> Callable[[Row], tuple[float, float] | None]:
    return lambda row: (row[part], row[whole]) if row[part] is not None and row[whole] else None


def _when_found(column: str, value: Callable[[int], float]) -> Callable[[Row], tuple[float, float] | None]:
    return lambda row: None if row[column] is None else (value(row[column]), 1)


METRICS: tuple[Metric, ...] = (
    *(_hit(k) for k in HIT_DEPTHS),
    Metric(
        "mrr_first",
        "MRR, first search",
        "share",
        True,
        lambda row: (reciprocal_rank(row["first_rank"]), 1),
        "mean of 1 / rank over all questions, a miss counting 0",
    ),
    Metric(
        "mrr_best",
        "MRR, best search",
        "share",
        True,
        lambda row: (reciprocal_rank(row["best_rank"]), 1) if row["best_known"] else None,
        "the same of each question's best search",
    ),
    Metric(
        "success",
        "Found by any search",
        "share",
        True,
        lambda row: (float(row["searches_to_success"] is not None), 1) if row["best_known"] else None,
        "a page with the answer was among the results that the agent was shown",
    ),
    Metric(
        "anls", "Answer, ANLS*", "share", True, _each("anls"), "likeness of the answer to the nearest reference answer"
    ),
    Metric(
        "page_f1", "Cited pages, F1", "share", True, _each("page_f1"), "cited pages against the pages with the answer"
    ),
    Metric(
        "page_precision",
        "Cited pages, precision",
        "share",
        False,
        _each("page_precision"),
        "share of cited pages that hold the answer",
    ),
    Metric(
        "page_recall",
        "Cited pages, recall",
        "share",
        False,
        _each("page_recall"),
        "share of pages with the answer that were cited",
    ),
    Metric("document_f1", "Cited documents, F1", "share", True, _each("document_f1"), "the same for documents"),
    Metric(
        "document_precision",
        "Cited documents, precision",
        "share",
        False,
        _each("document_precision"),
        "share of cited documents that hold the answer",
    ),
    Metric(
        "document_recall",
        "Cited documents, recall",
        "share",
        False,
        _each("document_recall"),
        "share of documents with the answer that were cited",
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
    ),
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
        "Searches until found (found only)",
        "number",
        False,
        lambda row: (row["searches_to_success"], 1) if row["best_known"] and row["searches_to_success"] else None,
        "number of the first search that found it, over questions where one did",
    ),
    Metric(
        "first_hit_rank",
        "Rank in first search (found only)",
        "number",
        False,
        _when_found("first_rank", float),
        "over questions whose first search found it",
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
        "prompt_tokens", "Prompt tokens a question", "number", False, _each("prompt_tokens"), "tokens sent, all turns"
    ),
    Metric(
        "completion_tokens",
        "Generated tokens a question",
        "number",
        False,
        _each("completion_tokens"),
        "tokens generated, all turns",
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


@dataclass(frozen=True)
class Runs:
    """Runs on the same questions, summed by document group.

    `numerators` and `denominators` are (groups × metrics) for each run; `counted` says how many questions a metric counts.
    """

    names: tuple[str, ...]
    questions: int
    groups: int
    numerators: tuple[bootstrap.Floats, ...]
    denominators: tuple[bootstrap.Floats, ...]
    counted: tuple[tuple[int, ...], ...]

    def sums(self) -> bootstrap.Floats:
        """All of them side by side, (groups × runs · 2 · metrics), for one resampling that all runs share."""
        return np.hstack([part for pair in zip(self.numerators, self.denominators, strict=True) for part in pair])


def read_runs(results: Sequence[Artifact]) -> Runs:
    """Read runs and see that they can be compared.

    Raises:
        InputError: none given, two have the same name, one holds a question twice, or they are on different questions.
    """
    tables = [sorted(read_rows(artifact), key=lambda row: row["question_id"]) for artifact in results]
    if not tables or not all(tables):
        raise InputError("there are no results to compare; run `drag evaluate` first")
    names = tuple(table[0]["run"] for table in tables)
    if len(set(names)) < len(names):
        raise InputError(f"two runs have the same name among {', '.join(names)}; name each run differently")
    ids = [[row["question_id"] for row in table] for table in tables]
    for name, artifact, found in zip(names, results, ids, strict=True):
        if len(set(found)) < len(found):
            raise InputError(
                f"run {name!r} holds a question more than once; evaluate one greedy rollout a question",
                file=artifact.uri,
            )
        if found != ids[0]:
            raise InputError(_difference(names[0], set(ids[0]), name, set(found)), file=artifact.uri)
    groups = bootstrap.document_groups(tables[0])
    parts = [_parts(table) for table in tables]
    return Runs(
        names=names,
        questions=len(groups),
        groups=int(groups.max()) + 1,
        numerators=tuple(bootstrap.group_sums(top, groups) for top, _ in parts),
        denominators=tuple(bootstrap.group_sums(bottom, groups) for _, bottom in parts),
        counted=tuple(tuple((bottom > 0).sum(axis=0).tolist()) for _, bottom in parts),
    )


def _parts(rows: Sequence[Row]) -> tuple[bootstrap.Floats, bootstrap.Floats]:
    values = np.array([[metric.parts(row) or (0.0, 0.0) for metric in METRICS] for row in rows], dtype=np.float64)
    return values[:, :, 0], values[:, :, 1]


def _difference(name: str, ids: set[str], other_name: str, other: set[str]) -> str:
    def some(only: set[str]) -> str:
        return ", ".join(sorted(only)[:3]) + (", …" if len(only) > 3 else "")

    sides = [(name, ids - other), (other_name, other - ids)]
    only = "; ".join(f"only in {side!r}: {len(missing)} ({some(missing)})" for side, missing in sides if missing)
    return f"runs {name!r} and {other_name!r} are on different questions, so they cannot be compared: {only}"


def metric_cells(runs: Runs, resamples: int) -> list[Cell]:
    """Every metric of every run that has it, metric by metric, with 95 % intervals over document groups."""
    totals = bootstrap.resampled_totals(runs.sums(), resamples)
    width = len(METRICS)
    cells = []
    for m, metric in enumerate(METRICS):
        for r, name in enumerate(runs.names):
            if not runs.counted[r][m]:
                continue
            mean = float(runs.numerators[r][:, m].sum() / runs.denominators[r][:, m].sum())
            column = 2 * r * width + m
            estimates = bootstrap.ratio(totals[:, column], totals[:, column + width])
            limits = (0.0, 1.0) if metric.kind == "share" else None
            low, high = bootstrap.interval(estimates, runs.groups, limits) or (None, None)
            cells.append(Cell(metric.name, name, runs.counted[r][m], mean, low, high))
    return cells


def show(metric: str, value: float) -> str:
    """A value as people read it: shares as percentages with one decimal."""
    kind = BY_NAME[metric].kind
    if kind == "share":
        return f"{100 * value:.1f} %"
    if kind == "seconds":
        return f"{value:.2f} s"
    return f"{value:.0f}" if value >= 100 else f"{value:.2f}"


def show_interval(metric: str, low: float | None, high: float | None, *, signed: bool = False) -> str:
    """ "[27.9, 44.1]"; a dash where there are too few groups for one."""
    if low is None or high is None or math.isnan(low) or math.isnan(high):
        return "–"
    scale, digits = (100, 1) if BY_NAME[metric].kind == "share" else (1, 0 if high >= 100 else 2)
    sign = "+" if signed else ""
    return f"[{scale * low:{sign}.{digits}f}, {scale * high:{sign}.{digits}f}]".replace("-", "−")


def metrics_markdown(cells: Sequence[Cell]) -> str:
    """The metric table as Markdown: a row a metric, a column a run, intervals in brackets."""
    runs = list(dict.fromkeys(cell.run for cell in cells))
    by_place = {(cell.metric, cell.run): cell for cell in cells}
    lines = ["| | " + " | ".join(runs) + " |", "|---|" + "---:|" * len(runs)]
    for metric in METRICS:
        row = [by_place.get((metric.name, run)) for run in runs]
        if any(row):
            texts = [f"{show(c.metric, c.mean)} {show_interval(c.metric, c.low, c.high)}" if c else "" for c in row]
            lines.append(f"| {metric.label} | " + " | ".join(texts) + " |")
    return "\n".join(lines)
