"""What an adapter learned, training by training: its provenance holds that of the adapter which it started from."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tasks.artifact import Artifact, read_provenance, read_rows

_COUNTED = ("examples", "questions", "steps")
_TOLD = ("settings", *_COUNTED, "started_from")
Training = Mapping[str, Any]


def started_from(start: Artifact | None) -> Training | None:
    """What a provenance keeps of the adapter that its training went on from."""
    return _told(read_provenance(start)) if start else None


def learned_questions(own: Iterable[str], start: Artifact | None, base: Path) -> list[str] | None:
    """Ids of all questions that an adapter has learned from, for its provenance; None where what it went on from does not say.

    Args:
        own: those of its own training.
        start: the adapter that it went on from, which says nothing where it is imported or of an earlier version.
        base: folder of its base model, which DRAG may have merged with an adapter: nobody knows of which questions.
    """
    if (base / "provenance.json").exists():
        return None
    before = read_provenance(start).get("learned_questions") if start else []
    return None if before is None else sorted({*own, *before})


def learned_about(adapter: Artifact, questions: Artifact) -> dict[str, Any]:
    """What an adapter has learned from, for the provenance of what it is asked: ids of "questions", the "documents" that they
    are about, and whether these are all ("known"): not where it was imported, or learned from a question that is not there.

    Args:
        questions: as they are ingested now, whose split need not be the one that was learned from.
    """
    ids = read_provenance(adapter).get("learned_questions")
    learned = set(ids or ())
    asked = read_rows(questions, ["question_id", "answer_locations"])
    found = {row["question_id"]: row["answer_locations"] for row in asked if row["question_id"] in learned}
    return {
        "questions": sorted(learned),
        "documents": sorted({place["document"] for places in found.values() for place in places}),
        "known": ids is not None and found.keys() == learned,
    }


def _told(made_of: Mapping[str, Any]) -> Training:
    known = made_of.get("trained") or made_of  # of an imported one: what its maker wrote
    return {name: known.get(name) for name in _TOLD}


def trainings(made_of: Mapping[str, Any]) -> list[Training]:
    """The trainings behind an adapter, in their order, as settings, examples, questions and steps; None each where unknown.

    Args:
        made_of: provenance of the adapter.
    """
    found: list[Training] = []
    training: Training | None = _told(made_of)
    while training:
        found.insert(0, {name: value for name, value in training.items() if name != "started_from"})
        training = training["started_from"]
    return found


def sentence(training: Training) -> str:
    """One training in words, such as "sft on 375 examples, 120 questions, 48 steps"."""
    if not training["settings"]:
        return "made elsewhere"
    counts = (f"{training[name]} {name}" for name in _COUNTED if training[name] is not None)
    return f"{training['settings'].get('method')} on {', '.join(counts)}"
