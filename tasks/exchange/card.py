"""The card of a data set: README.md in its folder, in the hub's form. Its head is what `datasets.load_dataset` reads."""

import re
from collections.abc import Mapping
from typing import Any

import yaml

from tasks.markdown import markdown_table

_ABOUT = {
    "pages": "A page of a document: its text, and where that comes from.",
    "trajectories": "Rollouts of an agent that searches documents to answer questions: every turn, query, result and answer, "
    "one row an attempt.",
    "mined": "Queries that a model wrote for a question, or where a conversation went on, and what a search for each finds.",
    "processed": "Rollouts that were kept, one row each, with the rank of the answer's page in every search.",
    "pairs": "Two queries for the same question, of which one ranked the answer's page better.",
    "sft": "A conversation and what is to be said next, in TRL's conversational prompt-completion form.",
    "dpo": "A conversation and two ways to go on, in TRL's conversational preference form.",
    "results": "How a run did on a question: ranks of the answer's pages, the answer's likeness, citations, cost.",
    "comparison": "How far a run differs from another on a metric, with a 95 % interval, a p-value and a verdict.",
    "images": "A page's image, which others name by its key.",
    "reward": "A question, a query, and how well the query ranked the answer's page.",
}


def card(parts: Mapping[str, Mapping[str, int]], made_of: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown with a YAML head.

    Args:
        parts: rows of each split of each configuration.
        made_of: provenance of each configuration.
    """
    head = {
        "configs": [
            {
                "config_name": name,
                "data_files": [{"split": split, "path": f"{name}/{split}.parquet"} for split in splits],
            }
            for name, splits in parts.items()
        ],
        "license": "unknown",
        "tags": ["drag", "document-retrieval", "search"],
    }
    rows = [
        (name, split, f"{count:,}", _ABOUT[re.split("[_-]", name)[0]])
        for name, splits in parts.items()
        for split, count in splits.items()
    ]
    text = [
        f"---\n{yaml.safe_dump(head, sort_keys=True)}---",
        "# How a model searched documents",
        "Written by DRAG. Splits of rollouts are those of the questions: what is in `test` and `dev` is not to be learned "
        "from. Where `images` is not null, each U+FFFC in a message's text stands for a page image that it names by `key`; "
        "the configuration `images` holds them.",
        markdown_table(("configuration", "split", "rows", "what a row is"), rows),
        '```\ndatasets.load_dataset("THIS_FOLDER", "' + next(iter(parts)) + '")\n```',
        "## How it was made",
        *(f"### {name}\n\n{markdown_table(('', ''), _facts(facts))}" for name, facts in made_of.items()),
        "provenance.json has the rest.",
    ]
    return "\n\n".join(text) + "\n"


def _facts(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a reader wants to know of a provenance: model, settings, inputs, versions. Results say what their rollouts are of."""
    settings = facts.get("settings", {})
    made = facts.get("results", facts).get("rollouts", facts)
    agent = made.get("agent") or made.get("settings", {}).get("agent") or {}
    shown = {"model": made.get("model"), "prompt": made.get("prompt_fingerprint"), **agent}
    shown |= {name: value for name, value in settings.items() if not isinstance(value, dict | list)}
    shown |= {f"made from {name}": f"sha256 {digest}" for name, digest in facts.get("inputs", {}).items()}
    shown |= {"drag": facts.get("packages", {}).get("drag")}
    return [(name, str(value)) for name, value in shown.items() if value is not None]
