"""The reference's training JSONL ↔ rows of training sets.

    sft_best, sft_trajectory, sft_context
               {"input": "<question>…</question>" and what was said since, "output": what is to be said}
    dpo        {"prompt": as input, "chosen": …, "rejected": …, ["chosen_score", "rejected_score"]}
    reward     {"input": "<question>…</question>\\n<search>…</search>", "score"}
    all        ["question_id", or "id"; "rank_score", "effort", "gt_rank"; "images" that the texts show as <image …/>, in order]

What is said is `<think>…</think>`, `<search>…</search>` or `<answer>…</answer>`; what stands between two such is what came
back. Without tags, `input` is the question and what is to be said a query. Fields in brackets may be missing: a question
without an id is known by its text; an example without scores weighs nothing under the schemes that count by them.

Read, an example is told as an agent of these settings speaks: its prompt comes first, and under the tools protocol searches
and answers are calls. Text that is neither (what a model wrote around its tags) belongs to what came back before it.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tasks import jsonl, records
from tasks.agent import prompts, protocol_tags
from tasks.agent.completion import Completion
from tasks.agent.message import PLACEHOLDER, Image, Message, images_of, scored_query, without_placeholders
from tasks.agent.protocol import as_stored
from tasks.config import Agent
from tasks.errors import ArtifactError
from tasks.exchange.rows import schema_of
from tasks.schemas import TABLES
from tasks.set_aside import Refused, printable

_ASKED = re.compile(r"\s*<question>(.*?)</question>\n?", re.DOTALL)
# what is told to the model with tags in it: nothing in a page or in what is asked of it is taken for the assistant's words
_TOLD = re.compile(rf"<results>.*?</results>|{re.escape(protocol_tags.LAST_TURN)}", re.DOTALL)
_WITHIN = r"(?:(?!<(?:think|search|answer)>).)*?"  # a complaint that names a tag does not open one
_SEARCH = rf"<search>{_WITHIN}</search>"
_SAID = re.compile(
    rf"(?:<think>{_WITHIN}</think>\s*)?(?:{_SEARCH}(?:\n{_SEARCH})*|<answer>{_WITHIN}</answer>)", re.DOTALL
)
_IMAGE = re.compile(r'<image file="[^\n]*?" page="\d+"/>')
_NUMBERS = ("rank_score", "effort", "score", "chosen_score", "rejected_score")
_TEXTS = {"dpo": ("prompt", "chosen", "rejected"), "reward": ("input",)}
_PREFIX = prompts.question_message("")["content"]


def read(record: Mapping[str, Any], kind: str, part: str, agent: Agent, unknown: Counter[str]) -> dict[str, Any]:
    """One line of JSONL as a row of the training set `kind`.

    Args:
        kind: a format's name.
        part: "train" or "val".
        unknown: is told the fields that are left out.

    Raises:
        Refused: why it cannot be used.
    """
    names = _TEXTS.get(kind, ("input", "output"))
    unknown.update(set(record) - {*names, "question_id", "id", "gt_rank", "images", *_NUMBERS})
    texts = {name: without_placeholders(records.text(records.field(record, name), name)) for name in names}
    shown = record.get("images") or []
    texts = _shown(texts, shown)
    asked = texts[names[0]]
    found = _ASKED.match(asked)
    question, since = (found[1].strip(), asked[found.end() :]) if found else (asked.strip(), "")
    if not question:
        raise Refused("empty_question", "there is no text in <question>")
    given_id = next((record[name] for name in ("question_id", "id") if record.get(name) is not None), None)
    by_text = hashlib.sha256(question.encode()).hexdigest()[:16]
    question_id = by_text if given_id is None else records.identifier(given_id, "question_id")
    row: dict[str, Any] = {
        "question_id": question_id,
        "split": part,
        "question": question,
        "format": kind,
        "gt_rank": None if record.get("gt_rank") is None else records.whole(record["gt_rank"], "gt_rank"),
        **{name: _number(record, name) for name in _NUMBERS},
        "prompt_fingerprint": prompts.prompt_fingerprint(agent),
        "tools": prompts.tools_json(agent),
    }
    if kind == "reward":
        said = _SAID.search(since)
        if not said or row["score"] is None:
            raise Refused("bad_example", "there is no <search> after the question, or no score")
        row |= scored_query(question, _only_query(said[0]))
    else:
        row["prompt"] = [*prompts.prompt_messages(question, agent), *_messages(since, agent)]
        for name, column in zip(names[1:], ("chosen", "rejected") if kind == "dpo" else ("completion",), strict=True):
            row[column] = _said(texts[name], kind, agent)
        _give_images(_in_order(row), shown)
    if kind == "dpo" and row["rank_score"] is None:
        row["rank_score"] = row["chosen_score"]
    return {name: row.get(name) for name in TABLES[schema_of(table_of(kind))].names}


def table_of(kind: str) -> str:
    """The table that a format's rows are kept in.

    >>> table_of("sft_context")
    'sft'
    """
    return kind.partition("_")[0]


def _number(record: Mapping[str, Any], name: str) -> float | None:
    return None if record.get(name) is None else records.finite(record[name], name)


def _said(text: str, kind: str, agent: Agent) -> list[Message]:
    """What is to be learned, as messages that end with the assistant's."""
    if not _SAID.search(text):
        query = " ".join(text.split())
        if kind == "sft_trajectory" or not query or "<" in query:
            raise Refused("bad_example", f"neither <search> nor <answer>: {printable(text, 80)}")
        return [prompts.search_message(None, query, agent)]
    messages = _messages(text, agent)
    if messages[-1]["role"] != "assistant" or (kind != "sft_trajectory" and len(messages) > 1):
        raise Refused("bad_example", f"it is not one thing that the assistant says: {printable(text, 80)}")
    return messages


def _messages(text: str, agent: Agent) -> list[Message]:
    """A conversation's text as messages, the assistant's and what came back to it, in turn."""
    hidden = _TOLD.sub(lambda found: "\0" * len(found[0]), text)
    messages: list[Message] = []
    at, calls = 0, 0
    for said in _SAID.finditer(hidden):
        messages += _back(text[at : said.start()], calls, agent)
        spoken, calls = _spoken(text[said.start() : said.end()], agent)
        messages.append(spoken)
        at = said.end()
    return messages + _back(text[at:], calls, agent)


def _spoken(text: str, agent: Agent) -> tuple[Message, int]:
    """The assistant's message, and how many searches are in it."""
    queries = re.findall(r"<search>(.*?)</search>", text, re.DOTALL)
    if agent.protocol == "tags":
        return {"role": "assistant", "content": text}, len(queries)
    reasoning, _, rest = text.removeprefix("<think>").rpartition("</think>")
    protocol = prompts.PROTOCOLS[agent.protocol]
    if not queries:
        answer = protocol_tags.parse(Completion(rest)).answer
        if answer is None:
            raise Refused("bad_example", f"the answer has no words: {printable(text, 80)}")
        return as_stored(protocol.answer(reasoning or None, answer)), 0
    wire = protocol.search(reasoning or None, queries[0])
    more = [call for query in queries[1:] for call in protocol.search(None, query).get("tool_calls", ())]
    return as_stored({**wire, "tool_calls": [*wire.get("tool_calls", ()), *more]}), len(queries)


def _back(text: str, calls: int, agent: Agent) -> list[Message]:
    """What came back to so many searches."""
    content = text.removeprefix("\n").removesuffix("\n")
    if not content:
        return []
    parts = re.split(r"\n(?=<results>)", content)
    if agent.protocol == "tools" and len(parts) == calls:
        return [{"role": "tool", "content": part} for part in parts]
    return [{"role": "user", "content": content}]


def _only_query(text: str) -> str:
    query = re.search(r"<search>(.*?)</search>", text, re.DOTALL)
    if query is None or not query[1].strip():
        raise Refused("bad_example", f"there is no query in it: {printable(text, 80)}")
    return query[1]


def write(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a training set as a line of JSONL: what `format --jsonl` writes of the same example.

    Raises:
        ArtifactError: its prompt asks no question.
    """
    if "score" in row:
        (asked,), (searched,) = row["prompt"], row["completion"]
        return jsonl.record({**row, "question": asked["content"], "query": searched["content"]})
    asked, earlier = _split(row["prompt"])
    line = jsonl.record({**row, "question": asked, "earlier": earlier})
    shown = [image for message in _in_order(row) for image in images_of(message)]
    return line | ({"images": shown} if shown else {})


def _in_order(row: Mapping[str, Any]) -> list[Message]:
    """The messages of an example, as its texts stand in a line."""
    return [message for name in ("prompt", "completion", "chosen", "rejected") for message in row.get(name) or []]


def _shown(texts: dict[str, str], images: Any) -> dict[str, str]:
    """The texts with a placeholder for each image, in the place of its tag."""
    left = list(images if isinstance(images, list) else [images])

    def place(tag: re.Match[str]) -> str:
        if not left or not isinstance(left[0], dict) or tag[0] != jsonl.image_tag(left[0]):
            return tag[0]
        left.pop(0)
        return PLACEHOLDER

    told = {name: _IMAGE.sub(place, text) for name, text in texts.items()}
    if left:
        raise Refused("bad_conversation", f"{len(left)} of its images have no tag in its texts, in their order")
    return told


def _give_images(messages: Sequence[Message], images: Sequence[Image]) -> None:
    """Each message its images, of those of all messages."""
    left = list(images)
    for message in messages:
        if places := message["content"].count(PLACEHOLDER):
            message["images"], left = left[:places], left[places:]
    if left:
        raise Refused("bad_conversation", f"{len(left)} of its images stand in no message")


def refuse_unasked(prompt: Sequence[Message]) -> None:
    """Refuse an example whose question is not known.

    Raises:
        Refused: no message of its prompt asks as the agent's prompt does.
    """
    if not any(map(_asks, prompt)):
        raise Refused("bad_conversation", f"no message of the prompt is of the user and begins with {_PREFIX!r}")


def _split(prompt: Sequence[Message]) -> tuple[str, list[Message]]:
    """The question of a prompt, and what was said since; worked examples stand before it."""
    at = next((at for at in reversed(range(len(prompt))) if _asks(prompt[at])), None)
    if at is None:
        raise ArtifactError(
            f"a prompt has no message of the user that begins with {_PREFIX!r}, so that its question is not known: make the "
            "training set again, or export it with layout hf"
        )
    return prompt[at]["content"].removeprefix(_PREFIX), list(prompt[at + 1 :])


def _asks(message: Message) -> bool:
    return message["role"] == "user" and message["content"].startswith(_PREFIX)


def lines(rows: Iterator[Mapping[str, Any]], part: str) -> Iterator[dict[str, Any]]:
    """The lines of one part, "train" or "val"."""
    return (write(row) for row in rows if row["split"] == part)
