"""What the model is told before its first turn: the same bytes when it is trained and when it is served."""

import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from tasks.agent import protocol_tags, protocol_tools
from tasks.agent.observation import observe
from tasks.agent.protocol import Answer, Ask, Protocol, Step, WireMessage, as_stored
from tasks.agent.trajectory import Message, SearchRecord
from tasks.config import Agent
from tasks.reward import Page

PROTOCOLS: Mapping[str, Protocol] = {"tags": protocol_tags.PROTOCOL, "tools": protocol_tools.PROTOCOL}


class Example(NamedTuple):
    """A worked example: a question that is searched for once, and answered from the page that was found."""

    question: str
    reasoning: str
    query: str
    file: str
    page: int
    text: str
    answer: str


EXAMPLES = (
    Example(
        "How long does the battery of the Aurora X2 lamp last on the dim setting?",
        "I need the lamp's battery life.",
        "Aurora X2 lamp battery life dim hours",
        "aurora-x2-guide.pdf",
        4,
        "Battery life of the Aurora X2: 30 hours dim, 6 hours bright. Charge it fully before first use.",
        "30 hours",
    ),
    Example(
        "Who was put in charge of the harbour works at the council's May meeting?",
        "I need who was appointed for the harbour works.",
        "council May harbour works appointed director",
        "council-minutes-may.pdf",
        2,
        "Harbour works. The council appointed Ms Odile Brandt as project director, effective 1 June.",
        "Odile Brandt",
    ),
    Example(
        "What did Fennel Foods earn per share in 2016?",
        "I need the earnings per share for 2016.",
        "Fennel Foods 2016 earnings per share EPS",
        "fennel-annual-report-2016.pdf",
        31,
        "Net income rose 4 %. Earnings per share (EPS) were $2.18 in 2016 and $2.05 in 2015.",
        "$2.18",
    ),
)


def wire_prompt(question: str, settings: Agent) -> list[WireMessage]:
    """The messages before the model's first turn, as the server gets them."""
    protocol = PROTOCOLS[settings.protocol]
    messages: list[WireMessage] = [{"role": "system", "content": protocol.system}]
    for example in EXAMPLES if settings.examples else ():
        messages += _worked(example, protocol, settings)
    return [*messages, _asked(question)]


def prompt_messages(question: str, settings: Agent) -> list[Message]:
    """The messages before the model's first turn, as they are stored and trained on.

    The one source of prompts. A model that will be served without worked examples is trained on the prompt of settings
    without them.
    """
    return [as_stored(message) for message in wire_prompt(question, settings)]


def tool_definitions(settings: Agent) -> list[dict[str, Any]] | None:
    """The tool definitions that the chat template is given; None in a protocol without tools."""
    tools = PROTOCOLS[settings.protocol].tools
    return None if tools is None else [dict(tool) for tool in tools]


def search_message(reasoning: str | None, query: str, settings: Agent) -> Message:
    """What the assistant says to search: the completion that a model is taught."""
    return as_stored(PROTOCOLS[settings.protocol].search(reasoning, query))


@functools.lru_cache(maxsize=64)
def prompt_fingerprint(settings: Agent) -> str:
    """Hash of all that the model is told before its first turn, whatever the question."""
    told = [prompt_messages("{question}", settings), tool_definitions(settings)]
    return hashlib.sha256(json.dumps(told, ensure_ascii=False).encode()).hexdigest()[:16]


def _asked(question: str) -> WireMessage:
    return {"role": "user", "content": f"Question: {question}"}


def _worked(example: Example, protocol: Protocol, settings: Agent) -> list[WireMessage]:
    """An example as earlier turns of the chat, in the form that real turns have."""
    page: Page = (example.file, example.page)
    found = SearchRecord(example.query, example.query, "query", [(1, *page, 1.0)], 1, 1.0)
    searching = protocol.search(example.reasoning, example.query)
    call_id = searching["tool_calls"][0]["id"] if "tool_calls" in searching else None
    step = Step("", searching, example.reasoning, (Ask(example.query, call_id=call_id),))
    seen = observe(found, settings, lambda file, page: example.text)
    answering = protocol.answer(None, Answer((example.answer,), (page,)))
    return [_asked(example.question), searching, *protocol.reply(step, [seen]), answering]
