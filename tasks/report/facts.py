"""How it was measured, as people read it, from the provenance of what was measured."""

from collections.abc import Iterator, Mapping
from typing import Any

from tasks.model import described
from tasks.training.lineage import sentence, trainings

Provenance = Mapping[str, Any]


def facts(rollouts: Mapping[str, Provenance], adapter: Provenance | None) -> dict[str, Any]:
    """Model, search and agent of each run, and each training of the adapter in its order.

    Args:
        rollouts: provenance of each run's rollouts, by the run's name.
        adapter: its provenance.
    """
    found: dict[str, Any] = {}
    for run, made in rollouts.items():
        settings = made["settings"]
        name = label(run, settings["agent"])
        found[f"Model of {name}"] = described(made["model"])
        found[f"Search of {name}"] = settings["search"]
        found[f"Agent of {name}"] = settings["agent"]
    for number, training in enumerate(trainings(adapter) if adapter else (), start=1):
        found[f"Training {number}"] = sentence(training)
        found[f"Settings of training {number}"] = training["settings"] or "unknown"
    return found


def label(run: str, agent: Mapping[str, Any]) -> str:
    """A run's name, and what one must know to read its figures: whether its prompt shows worked examples.

    Args:
        agent: settings of its agent.
    """
    return f"{run}, with examples" if agent.get("examples") else run


def flat(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Facts as (term, text): a mapping becomes "name value, name value", a list its items."""
    for name, value in found.items():
        if isinstance(value, Mapping):
            yield name, ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items())
        else:
            yield name, _plain(value)


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return "(" + ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items()) + ")"
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value)) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return str(value)
