"""The protocol of OpenAI tool calls: search_documents(query), provide_answer(answer, citations).

Calls are taken from where the server put them, else read out of the text, where Hermes and Qwen models write them as
<tool_call>{"name": …, "arguments": {…}}</tool_call>. The conversation keeps the text that the model wrote; where the server
took the calls out of it, they are put back in the one form of `protocol.call_text`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tasks.agent.completion import Completion, ToolCall
from tasks.agent.protocol import (
    Answer,
    Ask,
    Protocol,
    Step,
    WireMessage,
    as_stored,
    clean,
    json_object,
    one_line,
    page_number,
    split_reasoning,
    with_reasoning,
)
from tasks.reward import Page

SYSTEM = (
    "You answer questions from a collection of documents. Search it with search_documents until you have seen the answer "
    "on a page; when a search does not find it, try other words. Then call provide_answer, and cite the pages that show it."
)

# The order of the keys is that in which vLLM hands them to the chat template, so that training sees the same bytes.
TOOLS: tuple[Mapping[str, Any], ...] = (
    {
        "type": "function",
        "function": {
            "name": "search_documents",
            "description": 'Find pages by the words on them. "Quotes" hold a phrase together; AND, OR, NOT, parentheses '
            "and * work as usual.",
            "parameters": {
                "type": "object",
                "properties": {"query": {"type": "string", "description": "A few words that are on the page."}},
                "required": ["query"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "provide_answer",
            "description": "Give the final answer. This ends the conversation.",
            "parameters": {
                "type": "object",
                "properties": {
                    "answer": {
                        "type": "array",
                        "items": {"type": "string"},
                        "description": "The answer, short; several when the question asks for several.",
                    },
                    "citations": {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "properties": {"file": {"type": "string"}, "page": {"type": "integer"}},
                            "required": ["file", "page"],
                        },
                        "description": "The pages that show the answer.",
                    },
                },
                "required": ["answer", "citations"],
            },
        },
    },
)

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_FENCE = re.compile(r"^```\w*\s*(.*?)\s*```$", re.DOTALL)


def options(must_answer: bool) -> Mapping[str, Any]:
    """The tools; in a turn that must answer, the server is told to call provide_answer."""
    choice: Any = {"type": "function", "function": {"name": "provide_answer"}} if must_answer else "auto"
    return {"tools": TOOLS, "tool_choice": choice}


def parse(completion: Completion) -> Step:
    """What the calls mean, the server's or those in the text. Never raises."""
    if completion.tool_calls:
        text = clean(with_reasoning(completion.reasoning, completion.raw_text)).strip()
        reasoning = completion.reasoning or split_reasoning(text)[0]
        calls = [_canonical(call) for call in completion.tool_calls]
        message = {"role": "assistant", "content": text, "tool_calls": [_wire(call) for call in calls]}
        raw = as_stored(message)["content"]
        if any(json_object(call.arguments) is None for call in calls):
            message = {"role": "assistant", "content": raw}  # servers refuse broken arguments when they come back
    else:
        raw = clean(with_reasoning(completion.reasoning, completion.raw_text))
        reasoning, text = split_reasoning(raw)
        calls = _calls_in(text)
        message = {"role": "assistant", "content": raw}
    reasoning = clean(reasoning).strip() or None if reasoning else None
    asks: list[Ask] = []
    answer: Answer | None = None
    for call in calls:
        read = _read(call)
        if isinstance(read, Answer):
            answer = answer or read
        else:
            asks.append(read)
    if not calls:
        asks = [Ask(None, "no_action", "no tool was called")]
    if completion.tool_calls and "tool_calls" not in message:
        asks = [replace(ask, call_id=None) for ask in asks]  # a tool's message must follow a call
    return Step(raw, message, reasoning, tuple(asks), answer)


def _canonical(call: ToolCall) -> ToolCall:
    """A call with its arguments as a chat template would write them."""
    arguments = json_object(call.arguments)
    text = call.arguments if arguments is None else _dumps(arguments)
    return ToolCall(call.id, clean(call.name), clean(text))


def _dumps(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _wire(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _calls_in(text: str) -> list[ToolCall]:
    """Calls that the server left in the text: between <tool_call> tags, or the whole text is one JSON object."""
    blocks = [block.partition(_CLOSE)[0] for block in text.split(_OPEN)[1:]]
    if not blocks:
        bare = _FENCE.sub(r"\1", text.strip())
        call = json_object(bare)
        blocks = [bare] if call is not None and "name" in call else []
    return [_call_in(block.strip(), n) for n, block in enumerate(blocks)]


def _call_in(block: str, number: int) -> ToolCall:
    """One block as a call; braces that the model dropped at the end are forgiven. Unreadable: a call without a name."""
    call_id = f"call_{number}"
    for missing in ("", "}", "}}", '"}}'):
        call = json_object(block + missing)
        if call is not None and isinstance(call.get("name"), str):
            arguments = call.get("arguments", call.get("parameters", {}))
            return ToolCall(call_id, call["name"], arguments if isinstance(arguments, str) else _dumps(arguments))
    return ToolCall(call_id, "", block)


def _read(call: ToolCall) -> Ask | Answer:
    if not call.name:
        return Ask(None, "unparsable_call", "the tool call is no JSON object with a name and arguments", call.id)
    if call.name not in ("search_documents", "provide_answer"):
        return Ask(None, "unknown_tool", f"there is no tool {one_line(call.name)[:50]!r}", call.id)
    arguments = json_object(call.arguments)
    if arguments is None:
        return Ask(None, "unparsable_call", "the tool's arguments are no JSON object", call.id)
    if call.name == "search_documents":
        query = arguments.get("query")
        if not isinstance(query, str):
            return Ask(None, "bad_arguments", "search_documents takes one text, query", call.id)
        query = one_line(query)
        return Ask(query, call_id=call.id) if query else Ask(None, "empty_query", "the query has no words", call.id)
    texts = arguments.get("answer")
    texts = [texts] if isinstance(texts, str | int | float) else texts
    if not isinstance(texts, list) or not all(isinstance(text, str | int | float) for text in texts):
        return Ask(None, "bad_arguments", "provide_answer takes answer, a list of texts", call.id)
    said = tuple(line for line in (one_line(str(text)) for text in texts) if line)
    if not said:
        return Ask(None, "bad_arguments", "the answer is empty", call.id)
    return Answer(said, _citations(arguments.get("citations")))


def _citations(value: object) -> tuple[Page, ...]:
    """The citations that can be read; a wrong one does not cost the model its answer."""
    found: list[Page] = []
    for item in value if isinstance(value, list) else ():
        if isinstance(item, dict) and isinstance(item.get("file"), str) and (page := page_number(item.get("page"))):
            found.append((clean(item["file"]).strip(), page))
    return tuple(dict.fromkeys(found))


def reply(step: Step, texts: Sequence[str]) -> list[WireMessage]:
    """Each call gets its own tool message; where there is no call to refer to, the user speaks."""
    if any(ask.call_id is None for ask in step.asks):
        return [{"role": "user", "content": "\n\n".join(texts)}]
    return [
        {"role": "tool", "tool_call_id": ask.call_id, "content": text}
        for ask, text in zip(step.asks, texts, strict=True)
    ]


def _calling(reasoning: str | None, name: str, arguments: Mapping[str, Any]) -> WireMessage:
    call = ToolCall("call_0", name, _dumps(arguments))
    return {"role": "assistant", "content": with_reasoning(reasoning, "").strip(), "tool_calls": [_wire(call)]}


def search(reasoning: str | None, query: str) -> WireMessage:
    """The message that a model is taught to search with."""
    return _calling(reasoning, "search_documents", {"query": query})


def answer(reasoning: str | None, answer: Answer) -> WireMessage:
    """The message that a model is taught to answer with."""
    citations = [{"file": file, "page": page} for file, page in answer.citations]
    return _calling(reasoning, "provide_answer", {"answer": list(answer.texts), "citations": citations})


PROTOCOL = Protocol(SYSTEM, TOOLS, None, options, parse, reply, search, answer)
