"""What the model is told before its first turn: the same bytes when it is trained and when it is served."""

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from tasks.agent import protocol_tags, protocol_tools
from tasks.agent.message import Message, without_placeholders
from tasks.agent.protocol import Protocol, WireMessage, as_stored
from tasks.config import Agent
from tasks.errors import ConfigError

# what conversations must have in common with those that a model will be served
_SERVED_ALIKE = ("protocol", "observation", "top_k", "max_page_chars")
_SEEN_ALIKE = ("image_dpi", "image_min_pixels", "image_max_pixels", "image_max_bytes")

PROTOCOLS: Mapping[str, Protocol] = {"tags": protocol_tags.PROTOCOL, "tools": protocol_tools.PROTOCOL}


class Example(NamedTuple):
    """A worked example: a question, and the search that a skilled person starts with."""

    question: str
    query: str


# Searches alone: shown answers too, a small model answers from nothing instead of searching (SmolLM2-135M: of 40 first
# turns, 11 were searches at temperature 0 with whole examples, 33 with these). No years: it copies them into every query.
EXAMPLES = (
    Example(
        "I'm packing for the weekend. How long does the Aurora X2 lamp last on one charge?",
        "Aurora X2 lamp battery life",
    ),
    Example(
        "Could you tell me who was put in charge of the harbour works in May?",
        "harbour works director appointed May",
    ),
    Example(
        "How much did Fennel Foods make for each share?",
        "Fennel Foods earnings per share",
    ),
)


# words of them that hardly any question has: a query that does has them from the prompt
_NAMES = frozenset({"aurora", "x2", "harbour", "fennel"})


def wire_prompt(question: str, settings: Agent) -> list[WireMessage]:
    """The messages before the model's first turn, as the server gets them."""
    protocol = PROTOCOLS[settings.protocol]
    messages: list[WireMessage] = [{"role": "system", "content": protocol.system}]
    for example in EXAMPLES if settings.examples else ():
        searching = protocol.search(None, example.query)
        # servers refuse a tool call that nothing answers
        found = [
            {"role": "tool", "tool_call_id": c["id"], "content": "Found."} for c in searching.get("tool_calls", ())
        ]
        messages += [question_message(example.question), searching, *found]
    return [*messages, question_message(question)]


def repeats_examples(query: str, question: str) -> bool:
    """Whether a query names what only the worked examples are about. Small models say such names of whatever they are asked.

    It may find the page all the same, but a model that is served without the examples would learn to make them up.
    """
    named, asked = (_NAMES.intersection(re.findall(r"\w+", text.casefold())) for text in (query, question))
    return bool(named) and not asked


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


def tools_json(settings: Agent) -> str | None:
    """Those definitions as rollouts and training sets hold them."""
    tools = tool_definitions(settings)
    return None if tools is None else json.dumps(tools, ensure_ascii=False)


def search_message(reasoning: str | None, query: str, settings: Agent) -> Message:
    """What the assistant says to search: the completion that a model is taught."""
    return as_stored(PROTOCOLS[settings.protocol].search(reasoning, query))


@functools.lru_cache(maxsize=64)
def prompt_fingerprint(settings: Agent) -> str:
    """Hash of all that the model is told before its first turn, whatever the question."""
    told = [prompt_messages("{question}", settings), tool_definitions(settings)]
    return hashlib.sha256(json.dumps(told, ensure_ascii=False).encode()).hexdigest()[:16]


def told_by(settings: Agent) -> dict[str, Any]:
    """The settings that decide what an agent's prompt and conversations look like; not how long it may go on, say."""
    names = (*_SERVED_ALIKE, "examples", *(_SEEN_ALIKE if settings.sees_images else ()))
    return settings.model_dump(mode="json", include=set(names))


def refuse_other_conversations(collected: Mapping[str, Any], served: Agent) -> None:
    """Stored conversations are only shown to an agent that has such conversations itself.

    Args:
        collected: settings of the agent that had them.

    Raises:
        ConfigError: it spoke another protocol or saw pages otherwise.
    """
    for name in (*_SERVED_ALIKE, *(_SEEN_ALIKE if served.sees_images else ())):
        if collected.get(name) != getattr(served, name):
            raise ConfigError(
                f"conversations were collected with {name} {collected.get(name)}, but will be served with "
                f"{getattr(served, name)}: give the agent the same {name}, collect again, or use none: train on sft_best, or "
                "mine questions alone"
            )


def question_message(question: str) -> WireMessage:
    """How a question is put to the model."""
    return {"role": "user", "content": f"Question: {without_placeholders(question)}"}
