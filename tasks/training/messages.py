"""What training processes tell whoever started them: lines of JSON on standard output, among what libraries print.

    {"step", "total", "loss"}   a step is done
    {"warning"}                 it goes on, but not as the user will want it to
    {"error"}                   it ended with an error that the user can mend
    {"error", "rank", "world"}  a process ended otherwise, which its own lines explain

Each says whom it is from, as libraries may print JSON, too.
A process among several has its lines prefixed: "[rank N] line".
"""

import json
import re
from typing import Any, NamedTuple

PREFIX = "[rank {}] "
_FROM = {"from": "drag"}
_PREFIXED = re.compile(r"\[rank (\d+)\] (.*)")


class Line(NamedTuple):
    """One line: which process wrote it (None when there is but one), its text, and what it tells, if anything."""

    rank: int | None
    text: str
    message: dict[str, Any] | None


def tell(**message: Any) -> None:
    """One line to whoever started this program."""
    print(json.dumps(_FROM | message), flush=True)


def read(line: str) -> Line:
    """A line as its writer meant it."""
    prefixed = _PREFIXED.fullmatch(line)
    rank, text = (int(prefixed[1]), prefixed[2]) if prefixed else (None, line)
    return Line(rank, text, _message(text))


def _message(text: str) -> dict[str, Any] | None:
    if not text.startswith("{"):
        return None
    try:
        message = json.loads(text)
    except json.JSONDecodeError:
        return None
    return message if message.items() >= _FROM.items() else None
