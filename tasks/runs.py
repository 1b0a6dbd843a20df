"""Runs on the same questions → each metric of each run, a mean with a 95 % interval."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tasks import bootstrap
from tasks.artifact import Artifact, read_provenance, read_rows
from tasks.errors import InputError
from tasks.markdown import markdown_table
from tasks.metrics import METRICS, TWINS, Row, show, show_interval


@dataclass(frozen=True)
class Cell:
    """One metric of one run: mean, 95 % bounds (None where nothing can be said) and the questions it counts.

    `rare`: the bounds are likely too near, as what is counted, or for a share what is not, is in few groups.
    """

    metric: str
    run: str
    n: int
    mean: float
    low: float | None
    high: float | None
    rare: bool = False


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


# In simulations of shares of 5 and 95 % over 18 to 22 groups, 95 % intervals held the truth in 8 to 9 cases of 10 where fewer
# groups than these had any of the rarer kind, and in at least 96 of 100 elsewhere.
_FEW_GROUPS = 6
RARE = (
    f"† Likely too narrow an interval: what is counted, or of a share what is not, is in fewer than {_FEW_GROUPS} groups of "
    "questions that share documents."
)

_ASKED = ("question", "answers", "answer_locations")


def read_runs(results: Sequence[Artifact]) -> Runs:
    """Read runs and see that they can be compared.

    Raises:
        InputError: none given, two have the same name, one holds a question twice, they are on different questions, or were
            measured under other conditions.
    """
    tables = [sorted(read_rows(artifact), key=lambda row: row["question_id"]) for artifact in results]
    _refuse_what_cannot_be_compared(results, tables)
    return runs_of(tables)


def _refuse_what_cannot_be_compared(results: Sequence[Artifact], tables: Sequence[Sequence[Row]]) -> None:
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
    for name, artifact, table in zip(names, results, tables, strict=True):
        for row, first in zip(table, tables[0], strict=True):
            if any(row[field] != first[field] for field in _ASKED):
                raise InputError(
                    f"question {row['question_id']!r} has other words, answers or pages in run {name!r} than in {names[0]!r}: "
                    "it was ingested anew in between; evaluate both again",
                    file=artifact.uri,
                )

    first = conditions(results[0])
    for name, artifact in zip(names, results, strict=True):
        for what, value in conditions(artifact).items():
            if value != first[what]:
                this, other = value or "unknown", first[what] or "unknown"
                raise InputError(
                    f"run {name!r} was measured with {what} {this}, {names[0]!r} with {other}, so they cannot be compared; run "
                    "`drag evaluate` under the same settings for both",
                    file=artifact.uri,
                )


def conditions(results: Artifact) -> dict[str, Any]:
    """What a page's rank, and whether it was found, depend on beside the search: "depth" to which searches are ranked, "top_k"
    pages that the agent is shown, "index" that is searched. None each where results of an earlier version do not say."""
    made = asked = read_provenance(results)
    while "results" in asked:  # a run's first queries, ranked again
        asked = asked["results"]
    agent = asked.get("rollouts", {}).get("settings", {}).get("agent", asked)
    depth, index = made.get("settings", {}).get("depth"), made.get("inputs", {}).get("index")
    return {"depth": depth, "top_k": agent.get("top_k"), "index": index}


def runs_of(tables: Sequence[Sequence[Row]]) -> Runs:
    """Runs of results rows, a table a run: the same questions in the same order."""
    groups = bootstrap.document_groups(tables[0])
    parts = [_parts(table) for table in tables]
    return Runs(
        names=tuple(table[0]["run"] for table in tables),
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
            found = bootstrap.interval(estimates, runs.groups, limits) if metric.estimated else None
            low, high = found or (None, None)
            rare = found is not None and _is_rare(runs.numerators[r][:, m], runs.denominators[r][:, m], metric.kind)
            cells.append(Cell(metric.name, name, runs.counted[r][m], mean, low, high, rare))
    return cells


def _is_rare(numerators: bootstrap.Floats, denominators: bootstrap.Floats, kind: str) -> bool:
    """Whether few groups have any of what is counted, or of a share any of what is not. None at all is no such case: there the
    interval is as wide as what could have gone unseen."""
    sides = [numerators > 0, *([denominators - numerators > 1e-9] if kind == "share" else [])]
    return 0 < min(int(side.sum()) for side in sides) < _FEW_GROUPS


def shown_interval(cell: Cell) -> str:
    """A cell's bounds as people read them, marked where they are likely too near."""
    return show_interval(cell.metric, cell.low, cell.high) + ("†" if cell.rare else "")


def repeated(cells: Sequence[Cell]) -> set[str]:
    """Metrics that say of every run what another one says already."""
    said = {(cell.metric, cell.run): (cell.n, cell.mean, cell.low, cell.high) for cell in cells}
    differing = {m for (m, run), values in said.items() if m in TWINS and said.get((TWINS[m], run)) != values}
    return {metric for metric, _ in said if metric in TWINS} - differing


def repeated_markdown(metrics: Collection[str]) -> str:
    """What a table leaves out, in a line; nothing where that is nothing."""
    labels = ", ".join(metric.label for metric in METRICS if metric.name in metrics)
    return labels and f"Left out, as here they equal Hit@k or MRR of the first search: {labels}."


def metrics_markdown(cells: Sequence[Cell]) -> str:
    """The metric table as Markdown: a row a metric, a column a run, intervals in brackets."""
    runs = list(dict.fromkeys(cell.run for cell in cells))
    by_place = {(cell.metric, cell.run): cell for cell in cells}
    rows = []
    for metric in METRICS:
        row = [by_place.get((metric.name, run)) for run in runs]
        if any(row):
            texts = [f"{show(c.metric, c.mean)} {shown_interval(c)}".rstrip() if c else "" for c in row]
            rows.append((metric.label, *texts))
    table = markdown_table(("", *runs), rows, right=range(1, 1 + len(runs)))
    return f"{table}\n\n{RARE}" if any(cell.rare for cell in cells) else table
