"""What a report opens with: the share of every run, a verdict against each run before the last, and what looks broken."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Learned:
    """What a run's adapter had learned of the questions that it is measured on: how many of them it learned from, and how many
    are about a document that one was about which it learned from."""

    questions: int
    about: int
    known: bool  # whether it learned from nothing else


def learned(tables: Tables, results: Sequence[Artifact]) -> dict[str, Learned]:
    """That of each run of an adapter."""
    made = {run: read_provenance(artifact).get("rollouts", {}) for run, artifact in zip(tables, results, strict=True)}
    return {
        run: _learned(tables[run], rollouts.get("learned") or {})
        for run, rollouts in made.items()
        if "adapter" in rollouts.get("inputs", {})
    }


def _learned(rows: Sequence[Row], learned: Mapping[str, Any]) -> Learned:
    """Of what the rollouts' provenance says by `lineage.learned_about`; that of an earlier version says nothing."""
    questions, documents = (set(learned.get(name, ())) for name in ("questions", "documents"))
    asked = {row["question_id"]: {place["document"] for place in row["answer_locations"]} for row in rows}
    return Learned(
        questions=len(questions & asked.keys()),
        about=sum(name in questions or not documents.isdisjoint(places) for name, places in asked.items()),
        known=learned.get("known", False),
    )


def _overlaps(found: Mapping[str, Learned]) -> Iterator[str]:
    for run, own in found.items():
        if own.about:
            yield f"{run} learned from {own.questions} of them, and from questions about the documents of {own.about}"


def _how_new(found: Mapping[str, Learned]) -> str:
    """What can be said of the questions: nothing where it is not known of an adapter what it learned from, or there is none."""
    if overlaps := "; ".join(_overlaps(found)):
        return f" ({overlaps})"
    return " about unseen documents" if found and all(own.known for own in found.values()) else ""


def headline(
    differences: Sequence[Row], tables: Tables, results: Sequence[Artifact], named: Mapping[str, str]
) -> dict[str, Any] | None:
    """The sentence that the report opens with, in the parts that are set apart on the page, and its verdicts.

    Args:
        results: what `tables` were read from.
        named: `labels` of the runs.
    """
    rows = compare.headlines(differences)
    if not rows:
        return None
    numbers = {run: number for number, run in enumerate(tables)}
    run = rows[0]["run"]
    return {
        "run": run,
        "baseline": rows[0]["baseline"],
        "label": named[run],
        "number": numbers[run],
        "share": show(HEADLINE, rows[0]["run_mean"]),
        "questions": f"{rows[0]['n']} questions{_how_new(learned(tables, results))}",
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


def conclusion(differences: Sequence[Row], tables: Tables, results: Sequence[Artifact]) -> list[str]:
    """The same in plain lines, for the terminal."""
    questions = len(next(iter(tables.values())))
    seen = (f"of {questions} questions, {line}" for line in _overlaps(learned(tables, results)))
    return [*(compare.sentence(row) for row in compare.headlines(differences)), *seen, *broken(tables)]
