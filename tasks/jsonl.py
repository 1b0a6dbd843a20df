"""The reference pipeline's JSONL: plain text in tags, whatever protocol the agent speaks.

sft_*    {"input": "<question>…</question>", "output": "<think>…</think>\\n<search>…</search>", rank_score, effort, …}
dpo      {"prompt", "chosen", "rejected", "chosen_score", "rejected_score", …}
reward   {"input": "<question>…</question>\\n<search>…</search>", "score", …}
"""

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any, TextIO

from tasks import artifact, folders
from tasks.agent import protocol_tags, protocol_tools
from tasks.agent.completion import Completion
from tasks.agent.message import PLACEHOLDER, Message, images_of
from tasks.agent.protocol import as_stored
from tasks.artifact import Artifact


def say(reasoning: str | None, query: str) -> list[Message]:
    """An assistant's turn that searches.

    >>> say("It is about fees.", "annual fee")[0]["content"]
    '<think>It is about fees.</think>\\n<search>annual fee</search>'
    """
    return [as_stored(protocol_tags.search(reasoning, query))]


def record(example: Mapping[str, Any]) -> dict[str, Any]:
    """A neutral example (tasks/formats.py) as a line of JSONL."""
    asked = f"<question>{example['question']}</question>"
    if "query" in example:
        text = {"input": f"{asked}\n<search>{example['query']}</search>"}
    elif "chosen" in example:
        text = {
            "prompt": _joined([asked], example["earlier"]),
            "chosen": _joined([], example["chosen"]),
            "rejected": _joined([], example["rejected"]),
        }
    else:
        text = {"input": _joined([asked], example["earlier"]), "output": _joined([], example["completion"])}
    numbers = {
        name: example[name]
        for name in ("rank_score", "effort", "gt_rank", "score", "chosen_score", "rejected_score")
        if name in example
    }
    return {**text, **numbers, "question_id": example["question_id"]}


def _joined(before: list[str], messages: Iterable[Message]) -> str:
    return "\n".join([*before, *(in_tags(message) for message in messages)])


def image_tag(image: Mapping[str, Any]) -> str:
    """A page image in a plain text."""
    return f'<image file="{image.get("file")}" page="{image.get("page")}"/>'


def in_tags(message: Message) -> str:
    """What a message says, its tool calls and page images as tags; any other text as it stands.

    >>> call = '<tool_call>\\n{"name": "search_documents", "arguments": {"query": "annual fee"}}\\n</tool_call>'
    >>> in_tags({"role": "assistant", "content": call})
    '<search>annual fee</search>'
    """
    images = iter(images_of(message))
    content = re.sub(PLACEHOLDER, lambda _: image_tag(next(images)), message["content"])
    if message["role"] != "assistant":
        return content
    step = protocol_tools.parse(Completion(content))
    if step.answer is not None:
        return protocol_tags.answer(step.reasoning, step.answer)["content"]
    if not step.queries:
        return content
    reasonings = [step.reasoning, *[None] * (len(step.queries) - 1)]
    calls = zip(reasonings, step.queries, strict=True)
    return "\n".join(protocol_tags.search(reasoning, query)["content"] for reasoning, query in calls)


def write(
    lines: Iterable[tuple[str, Mapping[str, Any]]], names: Iterable[str], uri: str, facts: Mapping[str, Any]
) -> Artifact:
    """Store JSONL files as one folder artifact.

    Args:
        lines: (file name, its next example), files in any order.
        names: all file names, so that one without a line is there too.
    """
    rows = 0
    with folders.scratch("jsonl") as folder, ExitStack() as files:
        opened: dict[str, TextIO] = {
            name: files.enter_context((folder / name).open("w", encoding="utf-8", newline="\n")) for name in names
        }
        for name, example in lines:
            opened[name].write(json.dumps(record(example), ensure_ascii=False) + "\n")
            rows += 1
        files.close()  # everything is on disk before it is hashed and stored
        return artifact.write_folder(folder, uri, "jsonl/1", rows, facts)
