"""What an adapter learned, training by training: its provenance holds that of the adapter which it started from."""

from collections.abc import Mapping
from typing import Any

from tasks.artifact import Artifact, read_provenance

_COUNTED = ("examples", "questions", "steps")
_TOLD = ("settings", *_COUNTED, "started_from")
Training = Mapping[str, Any]


def started_from(start: Artifact | None) -> Training | None:
    """What a provenance keeps of the adapter that its training went on from."""
    return _told(read_provenance(start)) if start else None


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
