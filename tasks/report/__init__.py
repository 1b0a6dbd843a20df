"""The report: one HTML file that needs no network, with the verdict first, then tables, figures, method and trajectories.

Everything a model or a document said is untrusted. Jinja escapes it in the markup; the browser for trajectories gets it as
JSON in which no character can end the script element, and puts it on the page as text only; a content security policy
lets no script run but the report's own.
"""

import base64
import hashlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks import breakdown, compare, plots
from tasks.artifact import Artifact, provenance, read_provenance, read_rows, write_folder
from tasks.fate import FATES, MEANINGS
from tasks.metrics import BY_NAME, HEADLINE, METRICS, show, show_interval, wanted
from tasks.report.browser import embedded
from tasks.report.facts import flat
from tasks.report.headline import conclusion, headline, labels
from tasks.runs import RARE, Cell, conditions, metric_cells, read_runs, shown_interval

Row = Mapping[str, Any]
Rescored = Mapping[str, tuple[Sequence[Artifact], Artifact]]

_HERE = Path(__file__).parent
_SECTIONS = {
    "First search, and all searches": (
        *("hit_at_1", "hit_at_3", "hit_at_5", "hit_at_10", "mrr_first"),
        *("best_hit_at_1", "best_hit_at_3", "best_hit_at_5", "best_hit_at_10"),
        *("mrr_best", "success"),
    ),
    "All pages with the answer": (
        *("recall_at_3", "recall_at_5", "recall_at_10", "recall_seen"),
        *("ndcg_at_3", "ndcg_at_5", "ndcg_at_10", "ndcg_seen"),
    ),
    "Answers": (
        *("correct", "anls", "page_f1", "page_precision", "page_recall"),
        *("document_f1", "document_precision", "document_recall", "cited_seen", "fabricated"),
    ),
    "Conduct and cost": (
        *("valid_turns", "failed", "zero_results", "searches", "calls"),
        *("prompt_tokens", "completion_tokens", "seconds"),
    ),
    "Over found questions only: for reference, not for comparing": (
        *("searches_to_success", "calls_to_success", "first_hit_rank", "mrr_survivors"),
    ),
}
_BY_CATEGORY = ("hit_at_1", "mrr_first", "success", "correct")
_COLOURS = 6  # as many as report.css names
_MARKS = {"improved": "▲", "worse": "▼", "cannot tell": "≈"}


def write_report(
    results: Sequence[Artifact],
    comparison: Artifact,
    *,
    uri: str,
    facts: Mapping[str, Any],
    trajectories: Mapping[str, Artifact] | None = None,
    statistics: Mapping[str, Any] | None = None,
    loss_curve: Sequence[Row] = (),
    rescored: Rescored | None = None,
) -> Artifact:
    """Write index.html into a report artifact at `uri`.

    Args:
        results: runs on the same questions, baselines first; the report is about the last.
        comparison: of exactly these runs.
        facts: how it was measured, as people read it: {"Model": "…", "Search": {"operator": "or", …}, …}.
        trajectories: rollouts by run name, for the browser.
        statistics: of the collection that was learned from (tasks/statistics.py).
        loss_curve: rows of the training's loss curve.
        rescored: by title, the same first queries under other search settings: their results and comparison.

    Raises:
        InputError: the runs are on different questions, or were measured under other conditions.
    """
    page = render(
        results,
        comparison,
        facts=facts,
        rollouts={run: read_rows(artifact) for run, artifact in (trajectories or {}).items()},
        statistics=statistics,
        loss_curve=loss_curve,
        rescored=rescored or {},
    )
    inputs = {f"results {number}": artifact for number, artifact in enumerate(results)} | {"comparison": comparison}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "index.html").write_text(page, encoding="utf-8")
        lines = conclusion(read_rows(comparison), _tables(results), results)
        return write_folder(Path(folder), uri, "report/1", 1, provenance(inputs, facts=dict(facts), conclusion=lines))


def render(
    results: Sequence[Artifact],
    comparison: Artifact,
    *,
    facts: Mapping[str, Any],
    rollouts: Mapping[str, Sequence[Row]],
    statistics: Mapping[str, Any] | None,
    loss_curve: Sequence[Row],
    rescored: Rescored,
) -> str:
    """The report's HTML; see `write_report`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    tables = _tables(results)
    made, differences = read_provenance(comparison), read_rows(comparison)
    runs = read_runs(results)
    cells = metric_cells(runs, made["resamples"])
    named = labels(tables, results)
    script = _asset("report.js")
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html").render(
        headline=headline(differences, tables, results, named),
        broken=breakdown.broken(tables),
        tiles=[
            _tile(number, named[cell.run], cell) for number, cell in enumerate(c for c in cells if c.metric == HEADLINE)
        ],
        main=_table(cells, differences),
        rare=RARE,
        pairs=_pairs(differences),
        figures=list(_figures(tables, statistics, loss_curve)),
        ends=_ends(tables),
        passages=_passages(differences, tables),
        categories=_categories(tables, made["resamples"]),
        fewest_groups=breakdown.FEWEST_GROUPS,
        costs=_costs(tables),
        several_pages=sum(wanted(row) > 1 for row in next(iter(tables.values()))),
        rescored=[(title, *_rescored(again, other, made["resamples"])) for title, (again, other) in rescored.items()],
        questions=len(next(iter(tables.values()))),
        groups=runs.groups,
        conditions=conditions(results[0]),
        facts=list(flat(facts)),
        resamples=made["resamples"],
        meanings=[metric for metric in METRICS if any(cell.metric == metric.name for cell in cells)],
        packages=[(name, version) for name, version in made["packages"].items() if version],
        hashes=[(name, a.sha256) for name, a in [*zip(tables, results, strict=True), ("comparison", comparison)]],
        data=embedded(tables, rollouts),
        css=_asset("report.css"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _tables(results: Sequence[Artifact]) -> dict[str, Sequence[Row]]:
    return {rows[0]["run"]: rows for rows in map(read_rows, results)}


def _asset(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _tile(number: int, name: str, cell: Cell) -> dict[str, Any]:
    return {
        "run": name,
        "number": number % _COLOURS,
        "share": show(cell.metric, cell.mean),
        "interval": shown_interval(cell),
        "mean": round(100 * cell.mean, 2),
        "low": round(100 * (cell.mean if cell.low is None else cell.low), 2),
        "high": round(100 * (cell.mean if cell.high is None else cell.high), 2),
    }


def _table(cells: Sequence[Cell], differences: Sequence[Row]) -> dict[str, Any]:
    """The metric table: sections of rows, a column a run, and the last run's difference from the one before it."""
    runs = list(dict.fromkeys(cell.run for cell in cells))
    by_place = {(cell.metric, cell.run): cell for cell in cells}
    first = compare.headline(differences)
    judged = {r["metric"]: _difference(r) for r in differences if first and _pair(r) == _pair(first)}
    sections = []
    for title, names in _SECTIONS.items():
        rows = [
            {
                "label": BY_NAME[name].label,
                "cells": [_shown(by_place.get((name, run))) for run in runs],
                "difference": judged.get(name),
            }
            for name in names
            if any((name, run) in by_place for run in runs)
        ]
        if rows:
            sections.append((title, rows))
    pair, rare = _pair(first) if first else None, any(cell.rare for cell in cells)
    return {"runs": runs, "pair": pair, "sections": sections, "rare": rare}


def _shown(cell: Cell | None) -> dict[str, str] | None:
    if cell is None:
        return None
    return {"mean": show(cell.metric, cell.mean), "interval": shown_interval(cell)}


def _pair(row: Row) -> tuple[str, str]:
    return row["run"], row["baseline"]


def _difference(row: Row) -> dict[str, str]:
    return {
        "label": BY_NAME[row["metric"]].label,
        "points": compare.points(row["difference"]),
        "interval": show_interval(row["metric"], row["low"], row["high"], signed=True),
        "p": compare.p_text(row["p_value"]).removeprefix("p = ").removeprefix("p "),
        "smallest": "–" if row["smallest_visible"] is None else f"{100 * row['smallest_visible']:.1f}",
        "mark": _MARKS[row["verdict"]],
        "verdict": row["verdict"],
        "verdict_text": compare.verdict_text(row),
    }


def _pairs(differences: Sequence[Row]) -> list[dict[str, Any]]:
    """Each pair of runs, the last run's first, with its figure and its rows."""
    pairs = list(dict.fromkeys(_pair(row) for row in reversed(differences)))
    found = [(pair, [row for row in differences if _pair(row) == pair]) for pair in pairs]
    return [
        {"run": run, "baseline": baseline, "figure": plots.forest(rows), "rows": [_difference(row) for row in rows]}
        for (run, baseline), rows in found
    ]


def _ends(tables: breakdown.Tables) -> dict[str, Any]:
    """How questions ended: a row an end that occurs, a column a run."""
    counted = breakdown.ends(tables)
    rows = [
        {
            "label": MEANINGS[name][0],
            "meaning": MEANINGS[name][1],
            "cells": [
                (
                    counts[name],
                    f"{100 * counts[name] / counts.total():.1f} %",
                    round(100 * counts[name] / counts.total()),
                )
                for counts in counted.values()
            ],
        }
        for name in FATES
        if any(counts[name] for counts in counted.values())
    ]
    numbers = [list(tables).index(run) % _COLOURS for run in counted]
    return {"runs": list(zip(counted, numbers, strict=True)), "rows": rows}


def _passages(differences: Sequence[Row], tables: breakdown.Tables) -> dict[str, Any] | None:
    """What became of the questions from the run before to the last run: rows by the end before, columns by that after."""
    row = compare.headline(differences)
    moved = breakdown.passages(tables[row["baseline"]], tables[row["run"]]) if row else None
    if not row or not moved:
        return None
    called = breakdown.changes(tables[row["baseline"]], tables[row["run"]])
    before, after = ([name for name in FATES if any(pair[side] == name for pair in moved)] for side in (0, 1))
    most = max(moved.values())
    return {
        "before": row["baseline"],
        "after": row["run"],
        "unasked": [run for run in (row["baseline"], row["run"]) if not breakdown.asked(tables[run])],
        "columns": [MEANINGS[name][0] for name in after],
        "rows": [
            {
                "label": MEANINGS[old][0],
                "cells": [
                    {
                        "n": moved[old, new],
                        "tint": round(60 * moved[old, new] / most),
                        "kind": called[old, new],
                    }
                    for new in after
                ],
                "total": sum(moved[old, new] for new in after),
            }
            for old in before
        ],
        "totals": [sum(moved[old, new] for old in before) for new in after],
        "questions": moved.total(),
    }


def _categories(tables: breakdown.Tables, resamples: int) -> dict[str, Any] | None:
    """The chosen metrics by category, in the shape of the metric table."""
    found = breakdown.categories(tables, resamples)
    sections: list[tuple[str, list[dict[str, Any]]]] = []
    for metric in _BY_CATEGORY:
        rows: list[dict[str, Any]] = [
            {
                "label": category.name,
                "n": category.questions,
                "few": category.groups < breakdown.FEWEST_GROUPS,
                "cells": [_shown(category.cells.get((metric, run))) for run in tables],
            }
            for category in found
        ]
        if any(cell for row in rows for cell in row["cells"]):
            sections.append((BY_NAME[metric].label, rows))
    intervals = any(category.groups >= breakdown.FEWEST_GROUPS for category in found)
    rare = any(cell.rare for c in found if c.groups >= breakdown.FEWEST_GROUPS for cell in c.cells.values())
    return {"runs": list(tables), "sections": sections, "intervals": intervals, "rare": rare} if sections else None


def _costs(tables: breakdown.Tables) -> list[dict[str, Any]]:
    return [
        {
            "run": run,
            "number": number % _COLOURS,
            "rows": [(c.name, *map(breakdown.show_cost, (c.a_question, c.a_found, c.a_right))) for c in spent],
        }
        for number, (run, rows) in enumerate(tables.items())
        if (spent := breakdown.costs(rows))
    ]


def _figures(
    tables: Mapping[str, Sequence[Row]], statistics: Mapping[str, Any] | None, loss_curve: Sequence[Row]
) -> Iterator[tuple[str, str, str]]:
    """Title, note and SVG of each figure that there is data for."""
    ranks = {run: [row["first_rank"] for row in rows] for run, rows in tables.items()}
    yield (
        "How far down must one look?",
        "Share of all questions whose first search ranks a page with the answer among the first k.",
        plots.hit_curves(ranks),
    )
    yield (
        "Where does the first search put the page?",
        "Every question counts; “missed” are those whose page is not among the first ten, or that made no search.",
        plots.rank_bars(ranks),
    )
    calls = {
        run: None if rows[0]["turns"] is None else [row["calls_to_success"] for row in rows]
        for run, rows in tables.items()
    }
    if any((row["turns"] or 0) > 1 for rows in tables.values() for row in rows):
        yield (
            "How many model calls did it take?",
            "Every question by the number of the call whose search first showed the agent a page with the answer.",
            plots.call_bars(calls),
        )
    if statistics and statistics["rank_score"]:
        yield (
            "What was there to learn from?",
            f"{statistics['rollouts']['finished']} collected rollouts. Scores are counted in tenths, by their lower bound: 0.9 "
            "holds 1, which could not be better, and 0.0 what was not found.",
            plots.distributions(statistics),
        )
    if len(loss_curve) > 1:
        yield (
            "How did training go?",
            "Loss by optimizer step, in the adapter's last training; “How it was measured” lists them all.",
            plots.loss_curve(loss_curve),
        )


def _rescored(results: Sequence[Artifact], comparison: Artifact, resamples: int) -> tuple[dict[str, Any], list[str]]:
    differences = read_rows(comparison)
    sentences = [compare.sentence(row) for row in differences if row["metric"] == HEADLINE]
    return _table(metric_cells(read_runs(results), resamples), differences), sentences
