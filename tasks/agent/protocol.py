"""What a protocol is: how a model asks for a search and gives an answer, and how it is told what came of it.

A protocol is one file with one `Protocol` value, and one line in `prompts.PROTOCOLS`. Conversations are kept as they go
over the wire; `as_stored` is the one projection onto messages of role, content and images, which are stored and trained on.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

from tasks.agent.completion import Completion
from tasks.agent.message import Message, images_of, without_placeholders
from tasks.agent.trajectory import Action, TurnFailure
from tasks.reward import Page
from tasks.schemas import LARGEST

WireMessage = dict[str, Any]
"""A stored message with what the server gets beside it where tools are called: tool_calls or tool_call_id."""

Actions = tuple[Literal["search", "answer"], ...]
"""What the model may do in a turn."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One thing that the model asked for in a turn: a search, or what could not be understood as one."""

    query: str | None = None
    failure: TurnFailure | None = None
    detail: str | None = None
    call_id: str | None = None  # of the tool call that it came in


@dataclass(frozen=True, slots=True)
class Answer:
    """The model's final answer and the pages that it cites."""

    texts: tuple[str, ...]
    citations: tuple[Page, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """What a completion means under a protocol."""

    raw_text: str  # all that the model generated, with what the server took out of it put back in one defined way
    message: WireMessage  # the assistant's message as it stays in the conversation
    reasoning: str | None
    asks: tuple[Ask, ...]
    answer: Answer | None = None
    read_by: Literal["server", "parser"] | None = None  # None where nothing could be read
    repaired: bool = False  # broken JSON was mended

    @property
    def queries(self) -> list[str]:
        return [ask.query for ask in self.asks if ask.query is not None]

    @property
    def action(self) -> Action:
        return "answer" if self.answer is not None else "search" if self.queries else "none"


@dataclass(frozen=True)
class Protocol:
    """A way of talking with the model, as pure functions."""

    system: str  # the system prompt
    tools: tuple[Mapping[str, Any], ...] | None  # the tool definitions that the chat template is given
    last_turn: str | None  # what the model is told before a turn that must answer
    # (what the model may do, whether guided decoding holds it to that) → what is added to the request
    options: Callable[[Actions, bool], Mapping[str, Any]]
    parse: Callable[[Completion], Step]  # never raises
    reply: Callable[[Step, Sequence[str]], list[WireMessage]]  # (step, a text for each ask) → what follows the step
    search: Callable[[str | None, str], WireMessage]  # (reasoning, query) → the assistant's message that searches
    answer: Callable[[str | None, Answer], WireMessage]  # (reasoning, answer) → the assistant's message that answers


def tell_last_turn(messages: list[WireMessage], protocol: Protocol) -> None:
    """Tell the model that it must answer, in the message it reads last, as many chat templates want roles to alternate."""
    if protocol.last_turn is not None:
        messages[-1] = {**messages[-1], "content": f"{messages[-1]['content']}\n\n{protocol.last_turn}"}


def call_text(name: str, arguments: str) -> str:
    """A tool call as Hermes and Qwen chat templates write it. `arguments` is JSON."""
    return f'<tool_call>\n{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": {arguments}}}\n</tool_call>'


def as_stored(message: Mapping[str, Any]) -> Message:
    """A wire message as it is stored: role and content, tool calls written into the content.

    Under chat templates that write calls as `call_text` does (Hermes, Qwen2.5, Qwen3, Qwen3-VL), and under those that
    ignore tool calls in messages that have none, both forms render to the same bytes. Under a template with a form of its
    own (Llama 3, Mistral) they do not: a model is then trained on Hermes calls and served its own.
    """
    calls = [call_text(c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls", ())]
    content = "\n".join([part for part in (message["content"], *calls) if part])
    stored: Message = {"role": message["role"], "content": content}
    return stored | {"images": images} if (images := images_of(message)) else stored


_CALL = re.compile(
    r'(?P<before>(?s:.*))<tool_call>\n\{"name": "(?P<name>[^"\n]*)", "arguments": (?P<arguments>.*)\}\n</tool_call>'
)


def as_wire(messages: Sequence[Message]) -> list[WireMessage]:
    """Stored messages as the server gets them, when a conversation goes on from them; `as_stored` gives each back.

    As many calls at the end of an assistant's text as there are tool messages after it become calls again, which servers
    want to see before what answers them. Where they are not written as `call_text` does, the text stays as it is.
    """
    wire: list[WireMessage] = []
    ids: list[str] = []  # of the calls that the next tool messages answer
    for at, message in enumerate(map(as_stored, messages)):  # Parquet has put a null where there are no images
        if message["role"] == "tool":
            wire.append({**message, "tool_call_id": ids.pop(0)})
        else:
            answers = list(takewhile(lambda m: m["role"] == "tool", messages[at + 1 :]))
            ids = [f"call_{at}_{n}" for n in range(len(answers))]
            wire.append(_with_calls(message, ids))
    return wire


def _with_calls(message: Message, ids: Sequence[str]) -> WireMessage:
    """A message with the last calls in its text, one for each id, taken out of it."""
    rest = message["content"]
    calls: list[dict[str, Any]] = []
    for id_ in reversed(ids):
        found = _CALL.fullmatch(rest)
        if found is None or json_object(found["arguments"]) is None:
            return {**message}
        function = {"name": found["name"], "arguments": found["arguments"]}
        calls.insert(0, {"id": id_, "type": "function", "function": function})
        rest = found["before"].removesuffix("\n")
    wire = {**message, "content": rest} | ({"tool_calls": calls} if calls else {})
    return wire if as_stored(wire) == message else {**message}


def clean(text: str) -> str:
    """Text that can be stored: lone surrogates, which JSON can smuggle in, become question marks, and nothing stands for
    an image."""
    return without_placeholders(text.encode("utf-8", "replace").decode())


def one_line(text: str) -> str:
    return " ".join(clean(text).split())


def split_reasoning(text: str) -> tuple[str | None, str]:
    """(reasoning, what follows it). A missing opening <think> is forgiven: some templates write it into the prompt."""
    head, closed, tail = text.partition("</think>")
    if not closed:
        return None, text
    return head.rpartition("<think>")[2].strip() or None, tail


def with_reasoning(reasoning: str | None, text: str) -> str:
    """Put back the reasoning that a server's reasoning parser took out, as Qwen's chat template writes it."""
    return f"<think>\n{reasoning.strip()}\n</think>\n\n{text.strip()}" if reasoning else text


def json_object(text: str) -> dict[str, Any] | None:
    """A JSON object, or None when `text` is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


# "3, 5" and "pages 3-5", but not "3 of 12" nor "3.5"
_SEVERAL = re.compile(r"(?:pages?|pp?\.?)?\s*(\d+(?:\s*[,;–-]\s*\d+)+)", re.IGNORECASE)
_PAGES = re.compile(r"(\d+)(?:\s*[–-]\s*(\d+))?")
_LONGEST_RANGE = 20  # pages: of more, the first is meant


def page_numbers(value: object) -> list[int]:
    """The page numbers of a citation: several of "3, 5" or "pages 3-5", else one as `page_number` reads it, if any."""
    several = _SEVERAL.fullmatch(str(value)[:100].strip())
    if several is None:
        one = page_number(value)
        return [] if one is None else [one]
    numbers: list[int] = []
    for first, last in _PAGES.findall(several[1]):
        begin, end = page_number(first), page_number(last or first)
        if begin and end:
            numbers += range(begin, end + 1) if begin <= end < begin + _LONGEST_RANGE else [begin]
    return numbers


def page_number(value: object) -> int | None:
    """A page number from 1 out of 3, 3.0, "3" or "page 3"; None when there is none in it."""
    if isinstance(value, bool):
        return None
    digits = re.search(r"[0-9]+", str(value)[:100])
    number = int(digits[0]) if digits else 0
    return number if 1 <= number <= LARGEST else None
