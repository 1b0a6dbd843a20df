"""The card of an adapter: README.md in its folder, in the model hub's form, for whoever finds the adapter and nothing else.

It says what a reader wants to know; provenance.json beside it has the rest. The same training gives the same bytes: no time,
no host, no local path.
"""

from collections.abc import Mapping
from typing import Any

import yaml

from tasks.markdown import markdown_table
from tasks.training.lineage import sentence, trainings

_COUNTS = {
    "examples": "Examples learned from",
    "measured_on": "Examples measured on",
    "steps": "Optimizer steps",
    "tokens": "Tokens",
    "learned_tokens": "Tokens learned",
    "trained_parameters": "Parameters trained",
    "world_size": "Processes",
}
_MEASURED = {
    "accuracy": "Share of pairs held out that are told apart",
    "margin": "Mean margin of pairs held out",
    "spearman": "Spearman's ρ with the rank score, queries held out",
    "spearman_within": "Spearman's ρ within a question, mean of those held out",
    "kendall": "Kendall's τ with the rank score, queries held out",
    "kendall_within": "Kendall's τ within a question, mean of those held out",
}
_HELD_OUT = (
    "Held out are questions that this training did not learn from. They may be about documents that it did: what was measured on "
    "them is not what to expect on documents that are new."
)
_PACKAGES = ("drag", "torch", "transformers", "trl", "peft")


def measures(losses: Mapping[str, Any]) -> dict[str, float | None]:
    """What was measured at the end of training, by the names that people read.

    Args:
        losses: loss, eval_loss and `measured` of the last step (tasks/training/curve.py).
    """
    named = {_MEASURED[name]: value for name, value in losses["measured"].items()}
    return {"Loss": losses["loss"], "Loss on examples held out": losses["eval_loss"]} | named


def card(made_of: Mapping[str, Any], data: Mapping[str, Any], losses: Mapping[str, Any]) -> str:
    """Markdown with a YAML head.

    Args:
        made_of: provenance of the adapter.
        data: of the training set: formats, and the provenance that it was written with ("provenance").
        losses: loss, eval_loss and `measured` of the last step.
    """
    base, settings = made_of["base_model"], made_of["settings"]
    scores = settings["method"] == "reward"
    metrics: dict[str, Any] = dict(measures(losses))
    metrics |= {label: made_of[name] for name, label in _COUNTS.items()}
    agent, formatted = data["provenance"].get("agent", {}), data["provenance"].get("settings", {})
    trained_on = {
        "Training set": f"sha256 {made_of['inputs']['training_set']}",
        "Formats": ", ".join(data["formats"]),
        "Rank scores": data["provenance"].get("reward"),
        "Questions learned from": made_of["questions"],
        "Page images": made_of["images"],
        "Parts adapted": ", ".join(made_of["parts"]),
        "Started from": f"adapter sha256 {made_of['inputs']['start']}"
        if "start" in made_of["inputs"]
        else "base model",
        "Set aside": ", ".join(f"{count} {why}" for why, count in sorted(made_of["set_aside"].items())) or "none",
        "Made from": ", ".join(f"{name} sha256 {digest}" for name, digest in sorted(made_of["learned_from"].items()))
        or "?",
    }
    *earlier, _ = trainings(made_of)
    head = {
        "base_model": base,
        "library_name": "peft",
        "license": "unknown",
        "pipeline_tag": "text-classification" if scores else "text-generation",
        "tags": ["base_model:adapter:" + base, "drag", "lora", settings["method"]],
    }
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=True)}---",
        *(_reward_model(made_of) if scores else _agent(made_of)),
        f"## Metrics\n\n{_table(metrics)}" + (f"\n\n{_HELD_OUT}" if made_of["measured_on"] else ""),
        "## Data\n\n" + _table(trained_on),
        "How the agent was driven:\n\n" + _table(agent) if agent else "",
        "How the training set was written:\n\n" + _table(formatted) if formatted else "",
        f"## Settings\n\n{_table(settings | {'batching': made_of['batching']})}",
        f"A step learned from {settings['batch_size'] * settings['gradient_accumulation'] * made_of['world_size']} examples: "
        "batch_size × gradient_accumulation × processes.",
        *(f"## Trained before, {n}: {sentence(t)}\n\n{_table(t['settings'] or {})}" for n, t in enumerate(earlier, 1)),
        "## Versions\n\n" + _table({name: made_of["packages"][name] for name in _PACKAGES}),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _agent(made_of: Mapping[str, Any]) -> tuple[str, str]:
    method = made_of["settings"]["method"]
    how = {
        "sft": "trained by DRAG on searches that found the page they were after",
        "dpo": "trained by DRAG (DPO) on pairs of searches of which one ranked the page better than the other",
    }.get(method, f"trained by DRAG (method {method})")
    prompt = ", ".join(made_of["prompt_fingerprints"])
    served = f"to be served with the prompt of fingerprint {prompt}" if prompt else "of a prompt that is not known"
    return (
        f"# A LoRA adapter of {made_of['base_model']} that searches documents",
        f"It writes search queries for a search engine over pages, {how}. The base model's fingerprint is "
        f"{made_of['base_fingerprint']}; it is {served}.",
    )


def _reward_model(made_of: Mapping[str, Any]) -> tuple[str, str]:
    learned = {
        "regression": "it estimates the rank score, from 0 (not found) to 1 (ranked best)",
        "pairs": "of two queries of a question, the higher one ranked the page better",
    }[made_of["settings"]["reward_loss"]]
    return (
        f"# A reward model that scores search queries, a LoRA adapter of {made_of['base_model']}",
        f"It reads a question and a search query for it and gives one number: {learned}. Trained by DRAG. What it reads is the "
        "chat template of a user's turn (the question) with the generation prompt, then the query, behind a closed thought where "
        "that prompt has opened one; its last token's score counts. "
        "`AutoPeftModelForSequenceClassification.from_pretrained(FOLDER, num_labels=1)` loads it where transformers has the base "
        "model in that form; DRAG's `tasks.training.scoring.open_scorer` does everywhere. The base model's fingerprint "
        f"is {made_of['base_fingerprint']}.",
    )


def _table(values: Mapping[str, Any]) -> str:
    return markdown_table(("", ""), ((name, _shown(value)) for name, value in values.items()))


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "–" if value is None else str(value)
