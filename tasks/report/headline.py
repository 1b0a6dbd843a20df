"""What a report opens with: the share of every run, a verdict against each run before the last, and what looks broken."""

from collections.abc import Mapping, Sequence
from typing import Any

from tasks import compare
from tasks.artifact import Artifact, read_provenance
from tasks.breakdown import Tables, broken
from tasks.metrics import HEADLINE, show, show_interval
from tasks.report.facts import label

Row = Mapping[str, Any]


def labels(tables: Tables, results: Sequence[Artifact]) -> dict[str, str]:
    """How each run is called where its figures are told: "base, with examples", "question, as typed"."""
    return {run: _label(run, rows, artifact) for (run, rows), artifact in zip(tables.items(), results, strict=True)}


def _label(run: str, rows: Sequence[Row], results: Artifact) -> str:
    if all(row["turns"] is None for row in rows):
        return f"{run}, as typed"
    return label(run, read_provenance(results).get("rollouts", {}).get("settings", {}).get("agent", {}))


def headline(differences: Sequence[Row], tables: Tables, named: Mapping[str, str]) -> dict[str, Any] | None:
    """The sentence that the report opens with, in the parts that are set apart on the page, and its verdicts.

    Args:
        named: `labels` of the runs.
    """
    rows = compare.headlines(differences)
    if not rows:
        return None
    numbers = {run: number for number, run in enumerate(tables)}
    run = rows[0]["run"]
    unseen = all(question["split"] == "test" for question in tables[run])
    return {
        "run": run,
        "baseline": rows[0]["baseline"],
        "label": named[run],
        "number": numbers[run],
        "share": show(HEADLINE, rows[0]["run_mean"]),
        "questions": f"{rows[0]['n']} questions" + (" about unseen documents" if unseen else ""),
        "others": [
            {
                "label": named[row["baseline"]],
                "number": numbers[row["baseline"]],
                "share": show(HEADLINE, row["baseline_mean"]),
                "points": compare.points(row["difference"]),
                "interval": show_interval(HEADLINE, row["low"], row["high"], signed=True),
                "p": compare.p_text(row["p_value"]),
                "verdict": row["verdict"],
                "why": compare.why(row),
            }
            for row in rows
        ],
    }


def conclusion(differences: Sequence[Row], tables: Tables) -> list[str]:
    """The same in plain lines, for the terminal."""
    return [*(compare.sentence(row) for row in compare.headlines(differences)), *broken(tables)]
