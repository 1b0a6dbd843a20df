"""Runs on the same questions → how far each differs from those before it, how sure that is, and a verdict in words.

"improved" or "worse" is said only where the 95 % interval excludes 0 and the randomisation test has p < 0.05; each is over
groups of questions that share documents (tasks/bootstrap.py). Anything else is "cannot tell", with the smallest difference
that so many questions would have shown. Intervals are not widened for the number of metrics: Hit@1 of the first search is
the headline, fixed before any run.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tasks import bootstrap
from tasks.artifact import Artifact, provenance, table_of, write_table
from tasks.markdown import markdown_table
from tasks.metrics import BY_NAME, HEADLINE, METRICS, show, show_interval
from tasks.runs import Runs, read_runs

SCHEMA = "comparison/1"
SIGNIFICANT = 0.05
Row = Mapping[str, Any]


def compare(results: Sequence[Artifact], resamples: int, uri: str) -> Artifact:
    """Compare each run with each one before it, on every metric that counts all questions.

    Args:
        results: results of two or more runs, in the order of the tables: a baseline first.
        resamples: bootstrap resamples, and random swaps of the test.

    Raises:
        InputError: the runs are on different questions or were measured under other conditions, have the same name, or hold none.
    """
    runs = read_runs(results)
    totals = bootstrap.resampled_totals(runs.sums(), resamples)
    rows = [
        row
        for later in range(len(runs.names))
        for earlier in range(later)
        for row in _pair(runs, later, earlier, totals, resamples)
    ]
    inputs = dict(zip(runs.names, results, strict=True))
    return write_table(table_of(rows, SCHEMA), uri, SCHEMA, provenance(inputs, resamples=resamples))


def _pair(runs: Runs, run: int, baseline: int, totals: bootstrap.Floats, resamples: int) -> list[dict[str, Any]]:
    chosen = [
        m for m, metric in enumerate(METRICS) if metric.compared and runs.counted[run][m] and runs.counted[baseline][m]
    ]
    sides = [(runs.numerators[r][:, chosen], runs.denominators[r][:, chosen]) for r in (run, baseline)]
    p_values = bootstrap.swap_p_values(sides[0], sides[1], resamples)
    rows = []
    for place, m in enumerate(chosen):
        means = [float(top[:, place].sum() / bottom[:, place].sum()) for top, bottom in sides]
        estimates = [_estimates(totals, r, m) for r in (run, baseline)]
        differences = estimates[0] - estimates[1]
        low, high = bootstrap.interval(differences, runs.groups, (-1.0, 1.0)) or (None, None)
        rows.append(
            {
                "metric": METRICS[m].name,
                "run": runs.names[run],
                "baseline": runs.names[baseline],
                "n": runs.counted[run][m],
                "groups": runs.groups,
                "run_mean": means[0],
                "baseline_mean": means[1],
                "difference": means[0] - means[1],
                "low": low,
                "high": high,
                "p_value": float(p_values[place]),
                "smallest_visible": bootstrap.smallest_visible(differences, runs.groups),
                "verdict": _verdict(low, high, float(p_values[place])),
            }
        )
    return rows


def _estimates(totals: bootstrap.Floats, run: int, metric: int) -> bootstrap.Floats:
    column = 2 * run * len(METRICS) + metric
    return bootstrap.ratio(totals[:, column], totals[:, column + len(METRICS)])


def _verdict(low: float | None, high: float | None, p_value: float) -> str:
    if low is None or high is None or np.isnan(p_value) or p_value >= SIGNIFICANT or low <= 0 <= high:
        return "cannot tell"
    return "improved" if low > 0 else "worse"


def sentence(row: Row) -> str:
    """A comparison row as a verdict in words.

    For example: "adapter against base, Hit@1: 54.4 % against 36.1 %, +18.3 points [+10.0, +26.1], p = 0.0004, n = 180:
    improved", or "…: cannot tell, n = 180 too small to see less than 11.2 points".
    """
    metric = BY_NAME[row["metric"]]
    interval = show_interval(metric.name, row["low"], row["high"], signed=True)
    return (
        f"{row['run']} against {row['baseline']}, {metric.label}: {show(metric.name, row['run_mean'])} against "
        f"{show(metric.name, row['baseline_mean'])}, {points(row['difference'])} points{interval and ' ' + interval}, "
        f"{p_text(row['p_value'])}, n = {row['n']}: {verdict_text(row)}"
    )


def verdict_text(row: Row) -> str:
    """ "improved", "worse", or that nobody can tell, and why."""
    return ", ".join(filter(None, [row["verdict"], why(row)]))


def why(row: Row) -> str:
    """What the questions were too few to show; nothing where there is a verdict."""
    if row["verdict"] != "cannot tell":
        return ""
    if row["smallest_visible"] is None:
        return f"n = {row['n']} from one group of documents shows no difference of any size"
    return f"n = {row['n']} too small to see less than {100 * row['smallest_visible']:.1f} points"


def points(difference: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    return f"{100 * difference:+.1f}".replace("-", "−")


def p_text(p_value: float) -> str:
    return f"p = {p_value:.4f}" if p_value >= 0.0001 else "p < 0.0001"


def headlines(rows: Sequence[Row]) -> list[Row]:
    """What a report opens with: Hit@1 of the last run against the one before it, then against those before that."""
    chosen = [row for row in rows if row["metric"] == HEADLINE]
    return [row for row in reversed(chosen) if row["run"] == chosen[-1]["run"]]


def headline(rows: Sequence[Row]) -> Row | None:
    """The first of `headlines`."""
    return next(iter(headlines(rows)), None)


def comparison_markdown(rows: Sequence[Row]) -> str:
    """The comparison as a Markdown table, and under it what its verdicts mean."""
    header = ("", "metric", "difference, points", "95 % interval", "p", "verdict")
    compared = (
        (
            f"{row['run']} − {row['baseline']}",
            BY_NAME[row["metric"]].label,
            points(row["difference"]),
            show_interval(row["metric"], row["low"], row["high"], signed=True) or "–",
            p_text(row["p_value"]).removeprefix("p = ").removeprefix("p "),
            _short(row),
        )
        for row in rows
    )
    return "\n".join([markdown_table(header, compared, right=(2, 4)), "", *_meaning(rows)])


def _short(row: Row) -> str:
    smallest = row["smallest_visible"]
    if row["verdict"] != "cannot tell" or smallest is None:
        return str(row["verdict"])
    return f"cannot tell (under {100 * smallest:.1f})"


def _meaning(rows: Sequence[Row]) -> Iterator[str]:
    if not rows:
        return
    yield "*Improved* and *worse* are said only where the 95 % interval excludes 0 and p is below 0.05."
    n, groups = max(row["n"] for row in rows), rows[0]["groups"]
    if groups == 1:
        yield f"All n = {n} questions are of one group that shares documents, which shows no difference of any size."
    else:
        yield (
            f"In brackets, in points: n = {n} questions in {groups} groups that share documents are too few to show a smaller "
            "true difference four times in five."
        )
