"""The card of an adapter: README.md in its folder, in the model hub's form, for whoever finds the adapter and nothing else.

It says what a reader wants to know; provenance.json beside it has the rest. The same training gives the same bytes: no time,
no host, no local path.
"""

from collections.abc import Mapping
from typing import Any

import yaml

_COUNTS = {
    "examples": "Examples learned from",
    "measured_on": "Examples measured on",
    "steps": "Optimizer steps",
    "tokens": "Tokens",
    "learned_tokens": "Tokens learned",
    "trained_parameters": "Parameters trained",
    "world_size": "Processes",
}
_PACKAGES = ("drag", "torch", "transformers", "trl", "peft")


def card(made_of: Mapping[str, Any], data: Mapping[str, Any], losses: Mapping[str, float | None]) -> str:
    """Markdown with a YAML head.

    Args:
        made_of: provenance of the adapter.
        data: of the training set: questions, formats, and the provenance that it was written with ("provenance").
        losses: loss and eval_loss of the last step.
    """
    base, settings = made_of["base_model"], made_of["settings"]
    metrics = {"Loss": losses["loss"], "Loss on examples held out": losses["eval_loss"]}
    metrics |= {label: made_of[name] for name, label in _COUNTS.items()}
    agent, formatted = data["provenance"].get("agent", {}), data["provenance"].get("settings", {})
    trained_on = {
        "Training set": f"sha256 {made_of['inputs']['training_set']}",
        "Formats": ", ".join(data["formats"]),
        "Questions": data["questions"],
        "Set aside": ", ".join(f"{count} {why}" for why, count in sorted(made_of["set_aside"].items())) or "none",
        "Made from": ", ".join(f"{name} sha256 {digest}" for name, digest in sorted(made_of["learned_from"].items()))
        or "?",
    }
    head = {
        "base_model": base,
        "library_name": "peft",
        "license": "unknown",
        "pipeline_tag": "text-generation",
        "tags": ["base_model:adapter:" + base, "drag", "lora"],
    }
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=True)}---",
        f"# A LoRA adapter of {base} that searches documents",
        "It writes search queries for a search engine over pages, trained by DRAG on searches that found the page they were "
        f"after. The base model's fingerprint is {made_of['base_fingerprint']}; it is to be served with the prompt of "
        f"fingerprint {', '.join(made_of['prompt_fingerprints'])}.",
        "## Metrics\n\n" + _table(metrics),
        "## Data\n\n" + _table(trained_on),
        "How the agent was driven:\n\n" + _table(agent) if agent else "",
        "How the training set was written:\n\n" + _table(formatted) if formatted else "",
        f"## Settings\n\n{_table(settings)}",
        f"A step learned from {settings['batch_size'] * settings['gradient_accumulation'] * made_of['world_size']} examples: "
        "batch_size × gradient_accumulation × processes.",
        "## Versions\n\n" + _table({name: made_of["packages"][name] for name in _PACKAGES}),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(values: Mapping[str, Any]) -> str:
    rows = [f"| {name} | {_shown(value)} |" for name, value in values.items()]
    return "\n".join(["| | |", "| --- | --- |", *rows])


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "–" if value is None else str(value).replace("|", "\\|")
