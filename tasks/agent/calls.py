"""Tool calls as models write them in text, read where there is one reading and never guessed.

Three forms are read: <tool_call>{"name": …, "arguments": {…}}</tool_call> (Hermes, Qwen), of which one pair of tags may hold
several calls; <function=name><parameter=key>value</parameter></function> (Qwen3-Coder), with or without the tags, whose values
are all texts; and a text that begins with such JSON. A closing tag may be missing, and a tag may stand in a string.

Broken JSON is mended where that leaves one reading:

- closing brackets that are missing at the end of a call which the model ended, by its tag or by stopping;
- closing brackets too many after a whole object;
- one comma before a closing bracket;
- raw line breaks and other control characters within a string.

Everything else is unreadable: a string that was not closed, a call that ran out of tokens, a bracket missing in the middle, a
comma with nothing after it, quotes that were not escaped, hundreds of brackets; and what has two readings: a name that stands
twice in an object, a second call behind the first with anything but white space between them.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_STARTS = re.compile(r"<tool_call>|<function\s*=")
_FUNCTION = re.compile(r"<function\s*=\s*([^<>\s]+)\s*>")
_PARAMETER = re.compile(r"<parameter\s*=\s*([^<>\s]+)\s*>([^<]*(?:<(?!/?parameter\b)[^<]*)*)</parameter>")
_END_OF_FUNCTION = "</function>"
_FENCE = re.compile(r"^```\w*\s*(.*?)\s*```$", re.DOTALL)
_SPACE, _SURPLUS = re.compile(r"\s*"), re.compile(r"[\s}\]]*")
# a quote that is never closed is no token
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[{}\[\],]|[^"{}\[\],]+', re.DOTALL)
_PARTNER = {"{": "}", "[": "]"}
_OBJECT = re.compile(r'\{\s*"')
_MOST_BRACKETS = 500  # JSON with more is no call, and may be nested deeper than Python goes
_ERRORS = (ValueError, RecursionError)


@dataclass(frozen=True, slots=True)
class Call:
    """A call that could be read; `arguments` is any JSON value, an object where all is well."""

    name: str
    arguments: Any


@dataclass(frozen=True, slots=True)
class Block:
    """A place of a text that holds calls, text[start:end]; no calls where it could not be read."""

    start: int
    end: int
    calls: tuple[Call, ...] = ()
    mended: bool = False


def has_too_many_brackets(text: str) -> bool:
    """Whether JSON is not to be read, as nothing that we ask for looks so."""
    return text.count("{") + text.count("[") > _MOST_BRACKETS


def read_calls(text: str, cut_off: bool) -> list[Block]:
    """The places of a text that hold calls, in order. Never raises.

    Tags with no bracket after them are a mention of the tags, and count (as unreadable) only where nothing else is found.

    Args:
        cut_off: the text ended because the tokens ran out, so what is missing at its end is unknown.
    """
    found: list[Block] = []
    mentions: list[Block] = []
    at = 0
    while started := _STARTS.search(text, at):
        start = started.start()
        begin = _SPACE.match(text, started.end() if started[0] == _OPEN else start).end()  # type: ignore[union-attr]
        function = _FUNCTION.match(text, begin)
        if function:
            block = _function(text, start, function)
        elif started[0] != _OPEN:
            block = Block(start, started.end())
        else:
            block = _json(text, start, begin, cut_off)
        is_mention = not block.calls and not function and "{" not in text[begin : block.end]
        (mentions if is_mention else found).append(block)
        at = block.end
    return found or mentions[:1] or _bare(text, cut_off)


def _stop(text: str, at: int) -> tuple[int, int]:
    """Where the content of a pair of tags ends, and where what follows them begins."""
    closed, opened = text.find(_CLOSE, at), text.find(_OPEN, at)
    if closed >= 0 and not 0 <= opened < closed:
        return closed, closed + len(_CLOSE)
    end = opened if opened >= 0 else len(text)
    return end, end


def _json(text: str, start: int, at: int, cut_off: bool) -> Block:
    """A block of JSON values from `at`, which is behind the opening tag."""
    stop, end = _stop(text, at)
    values: list[Any] = []
    mended = False
    while at < len(text) and text[at] in _PARTNER:
        began = at
        try:
            value, at = _DECODER.raw_decode(text, at)
            stop, end = _stop(text, at)  # a tag within a string is none
        except _ERRORS:
            repaired = _mend(text[at:stop], cut_off and end == stop == len(text))
            if repaired is None:
                return Block(start, end)
            value, length = repaired
            at, mended = at + length, True
        if has_too_many_brackets(text[began:at]):
            return Block(start, end)
        values += value if isinstance(value, list) else [value]
        surplus = _SURPLUS.match(text, at, stop)
        assert surplus is not None
        mended = mended or bool(surplus[0].strip())
        at = surplus.end()
    # it goes on as JSON would, as a bracket came too early, or with another call behind something else
    if at < stop and (text[at] in ',:"' or _OBJECT.search(text, at, stop)):
        return Block(start, end)
    calls = [_call(value) for value in values]
    read = tuple(call for call, _ in calls if call is not None)
    if len(read) < len(values):
        return Block(start, end)
    return Block(start, end, read, mended or any(repaired for _, repaired in calls))


def _call(value: Any) -> tuple[Call | None, bool]:
    """A JSON value as a call, and whether its arguments, which may be JSON within a string, had to be mended."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None, False
    arguments = value.get("arguments", value.get("parameters", {}))
    if not isinstance(arguments, str):
        return Call(value["name"], arguments), False
    inner = arguments.strip()
    if has_too_many_brackets(inner):
        return Call(value["name"], arguments), False
    try:
        return Call(value["name"], json.loads(inner, object_pairs_hook=_each_once)), False
    except _ERRORS:
        repaired = _mend(inner, cut_off=False)
    if repaired is None or repaired[1] < len(inner):
        return Call(value["name"], arguments), False
    return Call(value["name"], repaired[0]), True


def _mend(text: str, cut_off: bool) -> tuple[Any, int] | None:
    """The JSON value at the start of a text, its slips mended, and its length there; None where it has not one reading."""
    expected: list[str] = []
    out: list[str] = []
    at = 0
    while token := _TOKEN.match(text, at):
        piece, at = token[0], token.end()
        if piece in _PARTNER:
            expected.append(_PARTNER[piece])
        elif piece in ("}", "]"):
            if not expected or expected.pop() != piece:
                return None
            _drop_comma(out)
        out.append(piece)
        if not expected:
            break
    if expected and (cut_off or at < len(text)):
        return None
    try:
        return json.loads("".join([*out, *reversed(expected)]), strict=False, object_pairs_hook=_each_once), at
    except _ERRORS:
        return None


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of these names and values; raises ValueError where a name has two, so that there is more than one reading."""
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a name stands twice in an object")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_each_once)


def _drop_comma(out: list[str]) -> None:
    """Take a comma from the end, unless nothing stands before it."""
    said = [n for n in range(max(0, len(out) - 4), len(out)) if not out[n].isspace()]
    if len(said) >= 2 and out[said[-1]] == "," and out[said[-2]] not in _PARTNER:
        del out[said[-1]]


def _function(text: str, start: int, function: re.Match[str]) -> Block:
    """A block of <function=…>, or of several within a pair of <tool_call>."""
    calls: list[Call] = []
    at = function.start()
    while function_ := _FUNCTION.match(text, at):
        closed = text.find(_END_OF_FUNCTION, function_.end())
        if closed < 0:
            return Block(start, len(text))
        body = text[function_.end() : closed]
        at = _SPACE.match(text, closed + len(_END_OF_FUNCTION)).end()  # type: ignore[union-attr]
        if _PARAMETER.sub("", body).strip():
            return Block(start, at)
        given = [(name, value.removeprefix("\n").removesuffix("\n")) for name, value in _PARAMETER.findall(body)]
        if len(arguments := dict(given)) < len(given):
            return Block(start, at)
        calls.append(Call(function_[1], arguments))
    if text.startswith(_CLOSE, at):
        at += len(_CLOSE)
    return Block(start, at, tuple(calls))


def _bare(text: str, cut_off: bool) -> list[Block]:
    """A text that begins with calls, perhaps in a code fence; JSON that names no arguments is something else."""
    bare = _FENCE.sub(r"\1", text.strip())
    if bare[:1] not in _PARTNER or not ('"arguments"' in bare or '"parameters"' in bare):
        return []
    block = _json(bare, 0, 0, cut_off)
    return [Block(0, len(text), block.calls, block.mended)] if block.calls else []
