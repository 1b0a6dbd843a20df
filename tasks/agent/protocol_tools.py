"""The protocol of OpenAI tool calls: search_documents(query), provide_answer(answer, citations).

Calls are always read by us (tasks/agent/calls.py), out of the whole text: where the server took reasoning and calls out of it,
they are put back in the one form of `protocol.call_text`, so that stored text can be read again and gives the same. The
server's calls go back to it as calls where it read the text as we do; else the conversation keeps the text, with calls whose
JSON was mended as they were meant.

What servers were seen to do, here vLLM 0.32 with its parsers hermes and qwen3: one broken call, and all calls of the turn stay
in the text, without the </think> before them; arguments that are JSON within a string are handed on as such; what follows the
calls is lost. Its parser qwen3_coder drops calls in JSON without a trace: no reading mends that.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tasks.agent.calls import Block, Call, has_too_many_brackets, read_calls
from tasks.agent.completion import Completion, ToolCall
from tasks.agent.protocol import (
    Actions,
    Answer,
    Ask,
    Protocol,
    Step,
    WireMessage,
    as_stored,
    call_text,
    clean,
    json_object,
    one_line,
    page_numbers,
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

# What guided decoding demands of a call's arguments, as regular expressions: short enough to be whole before the tokens run
# out. A file name may be as long as file systems allow.
_WORDS, _NAME = (rf'"([^"\\\x00-\x1f\s]|\\")([^"\\\x00-\x1f]|\\"){{0,{most - 1}}}"' for most in (120, 255))
_QUERY = rf'\{{"query": {_WORDS}\}}'
_CITED = rf'\{{"file": {_NAME}, "page": [1-9][0-9]{{0,3}}\}}'
_ANSWER = rf'\{{"answer": \[{_WORDS}(, {_WORDS}){{0,4}}\], "citations": \[({_CITED}(, {_CITED}){{0,14}})?\]\}}'
_GUIDES = {"search": ("search_documents", _QUERY), "answer": ("provide_answer", _ANSWER)}


def options(actions: Actions, guided: bool) -> Mapping[str, Any]:
    """The tools; in a turn that must answer, the server is told to call provide_answer.

    Guided, vLLM lets the model write nothing but one call of the right form. With a reasoning parser it does so after the
    reasoning. The calls are not demanded by tool_choice then, under which vLLM checks no arguments and ignores the guide.
    """
    if guided:
        guide = json.dumps({"type": "structural_tag", "format": _guide(actions)})
        return {"tools": TOOLS, "tool_choice": "auto", "structured_outputs": {"structural_tag": guide}}
    choice: Any = "auto"
    if actions == ("answer",):
        choice = {"type": "function", "function": {"name": "provide_answer"}}
    return {"tools": TOOLS, "tool_choice": choice}


def _guide(actions: Actions) -> dict[str, Any]:
    """One call of the tools of these actions, as `call_text` writes it, in the terms of xgrammar's structural tags."""
    tags = []
    for name, arguments in (_GUIDES[action] for action in actions):
        begin, end = call_text(name, "|").split("|")
        tags.append({"begin": begin, "content": {"type": "regex", "pattern": arguments}, "end": end})
    return {
        "type": "tags_with_separator",
        "tags": tags,
        "separator": "",
        "at_least_one": True,
        "stop_after_first": True,
    }


def parse(completion: Completion) -> Step:
    """What the calls mean. Never raises."""
    text = clean(with_reasoning(completion.reasoning, completion.raw_text))
    served = [_canonical(call) for call in completion.tool_calls]
    message: WireMessage = {"role": "assistant", "content": text}
    if served:
        message = {"role": "assistant", "content": text.strip(), "tool_calls": [_wire(call) for call in served]}
    raw = as_stored(message)["content"] if served else text
    reasoning, blocks = _read_text(raw, cut_off=completion.finish_reason == "length")
    calls = [call for block in blocks for call in block.calls]
    agreed = bool(served) and len(blocks) == sum(bool(block.calls) for block in blocks) and _same(served, calls)
    if not agreed:
        message = {"role": "assistant", "content": _as_meant(raw, blocks)}
    asks: list[Ask] = []
    answer: Answer | None = None
    ids = iter([call.id for call in served] if agreed else [f"call_{n}" for n in range(len(calls))])
    for block in blocks:
        for call in block.calls:
            read = _read(call, next(ids))
            if isinstance(read, Answer):
                answer = answer or read
            else:
                asks.append(read)
        if not block.calls:
            asks.append(Ask(None, "unparsable_call", "the tool call is no JSON object with a name and arguments"))
    if not blocks:
        asks = [Ask(None, "no_action", "no tool was called")]
    return Step(
        raw,
        message,
        reasoning,
        tuple(asks),
        answer,
        read_by=("server" if agreed else "parser") if calls else None,
        repaired=any(block.mended for block in blocks),
    )


def _read_text(raw: str, cut_off: bool) -> tuple[str | None, list[Block]]:
    """(reasoning, the places of the text that hold calls).

    Calls within the reasoning count only where none follows it: the first that can be read ends the reasoning, and those
    that follow it without a word between belong to it.
    """
    reasoning, text = split_reasoning(raw)
    start = len(raw) - len(text)
    blocks = [Block(b.start + start, b.end + start, b.calls, b.mended) for b in read_calls(text, cut_off)]
    if blocks:
        if start == 0:  # reasoning that was never closed
            opened, reasoning = raw.find("<think>"), None
            if 0 <= opened < blocks[0].start:
                reasoning = raw[opened + len("<think>") : blocks[0].start].strip() or None
        return reasoning, blocks
    thought = raw[:start].removesuffix("</think>")
    inside = [block for block in read_calls(thought, False) if block.calls]
    run = inside[:1]
    for block in inside[1:]:
        if thought[run[-1].end : block.start].strip():
            break
        run.append(block)
    if run:
        reasoning = thought[: run[0].start].rpartition("<think>")[2].strip() or None
    return reasoning, run


def _as_meant(raw: str, blocks: Sequence[Block]) -> str:
    """The text with mended calls in the place of the broken ones."""
    parts, at = [], 0
    for block in blocks:
        if block.mended:
            parts += [raw[at : block.start], "\n".join(call_text(c.name, _dumps(c.arguments)) for c in block.calls)]
            at = block.end
    return clean("".join([*parts, raw[at:]]))


def _same(served: Sequence[ToolCall], calls: Sequence[Call]) -> bool:
    """Whether the server read the calls that we read."""
    return [(c.name, json_object(c.arguments)) for c in served] == [(clean(c.name), c.arguments) for c in calls]


def _canonical(call: ToolCall) -> ToolCall:
    """A call with its arguments as a chat template would write them."""
    arguments = None if has_too_many_brackets(call.arguments) else json_object(call.arguments or "{}")
    text = call.arguments if arguments is None else _dumps(arguments)
    return ToolCall(call.id, clean(call.name), clean(text))


def _dumps(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _wire(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _read(call: Call, call_id: str) -> Ask | Answer:
    arguments = call.arguments
    if call.name not in ("search_documents", "provide_answer"):
        return Ask(None, "unknown_tool", f"there is no tool {one_line(call.name)[:50]!r}", call_id)
    if not isinstance(arguments, dict):
        return Ask(None, "bad_arguments", "the tool's arguments are no JSON object", call_id)
    if call.name == "search_documents":
        query = arguments.get("query")
        if not isinstance(query, str):
            return Ask(None, "bad_arguments", "search_documents takes one text, query", call_id)
        query = one_line(query)
        return Ask(query, call_id=call_id) if query else Ask(None, "empty_query", "the query has no words", call_id)
    texts = _listed(arguments.get("answer"))
    if texts is None or not all(isinstance(text, str | int | float) for text in texts):
        return Ask(None, "bad_arguments", "provide_answer takes answer, a list of texts", call_id)
    said = tuple(line for line in (one_line(str(text)) for text in texts) if line)
    if not said:
        return Ask(None, "bad_arguments", "the answer is empty", call_id)
    return Answer(said, _citations(arguments.get("citations")))


def _listed(value: object) -> list[Any] | None:
    """A list; also one that is JSON within a string, and one text or number alone."""
    if isinstance(value, str) and value.strip().startswith("["):
        try:
            inner = json.loads(value)
        except (ValueError, RecursionError):
            return [value]
        return inner if all(isinstance(item, str | int | float | dict) for item in inner) else [value]
    return value if isinstance(value, list) else [value] if isinstance(value, str | int | float) else None


def _citations(value: object) -> tuple[Page, ...]:
    """The citations that can be read; a wrong one does not cost the model its answer."""
    found: list[Page] = []
    for item in _listed(value) or ():
        if isinstance(item, dict) and isinstance(item.get("file"), str):
            found += [(clean(item["file"]).strip(), page) for page in page_numbers(item.get("page"))]
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
