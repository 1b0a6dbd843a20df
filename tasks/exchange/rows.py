"""Our own rows out of JSONL or Parquet: what an export wrote, checked again as if anybody had.

A row holds the columns of its schema (tasks/schemas.py), of which many may be null; other fields are left out and counted.
What makes it unusable further on, such as a search without results, a conversation with fewer turns than the row says, or
without images that it speaks of, refuses it.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from tasks import records, storage
from tasks.agent.message import PLACEHOLDER, images_of
from tasks.agent.trajectory import turn_messages
from tasks.errors import InputError
from tasks.records import Record
from tasks.schemas import MESSAGE, TABLES
from tasks.set_aside import Refused, SetAside, printable
from tasks.splits import SPLITS

_NEEDED = {
    "trajectories": (
        *("rollout_id", "question_id", "question", "answer_locations", "status", "outcome", "sampling", "top_k"),
        *("turns", "answer", "citations", "messages"),
    ),
    "processed": (
        *("rollout_id", "question_id", "question", "top_k", "searches", "reasonings", "search_messages"),
        *("rank_score", "effort", "messages", "prompt_messages"),
    ),
    "pairs": (
        *("question_id", "question", "earlier", "source", "chosen", "rejected"),
        *("chosen_score", "rejected_score", "chosen_effort", "rejected_effort"),
    ),
    "sft": ("question_id", "split", "format", "prompt", "completion"),
    "dpo": ("question_id", "split", "prompt", "chosen", "rejected"),
    "reward": ("question_id", "split", "prompt", "completion", "score"),
}
_NEEDED_OF_EACH = {  # of what such a list holds, wherever in a row it stands
    "answer_locations": ("document", "page"),
    "turns": ("raw_text", "searches"),
    "searches": ("query", "read_as", "results", "rank_score"),
    "results": ("file", "page_number"),
    "citations": ("file", "page"),
}

_TRAINED_ON = ("sft", "dpo", "reward")
_SAID_BY = {  # in one message each
    "dpo": {"chosen": "assistant", "rejected": "assistant"},
    "reward": {"prompt": "user", "completion": "assistant"},
}


def schema_of(kind: str) -> str:
    """The schema that this version writes of a kind of table.

    >>> schema_of("set_aside")
    'set_aside/1'
    """
    (found,) = (name for name in TABLES if name.partition("/")[0] == kind)
    return found


def files_of(source: str, name: str) -> list[str]:
    """The files that a source holds of `name`: itself, or the parts of that configuration of a data set's folder.

    Raises:
        InputError: there is none.
    """
    if storage.is_file(source):
        return [source]
    parts = [file for file in storage.iter_files(storage.join(source, name)) if file.endswith(".parquet")]
    if not parts:
        raise InputError(
            f"there is neither such a file nor a folder with {name}/….parquet; check the path", file=source
        )
    return parts


def read(file: str) -> tuple[str, Iterator[Record]]:
    """A file's name for messages, and its rows.

    Raises:
        InputError: it is neither .jsonl nor .parquet, or cannot be read.
    """
    name = printable(file.rsplit("/", 1)[-1])
    if file.endswith(".parquet"):
        return f"{Path(file).parent.name}/{name}", records.read_parquet(file)
    if file.endswith(".jsonl"):
        return name, records.read_jsonl(file)
    raise InputError("is neither .jsonl nor .parquet", file=file)


def native(row: Mapping[str, Any], kind: str, unknown: Counter[str], derived: Iterable[str] = ()) -> dict[str, Any]:
    """A row of our own, with the columns of its schema alone.

    Args:
        kind: such as "trajectories".
        unknown: is told the fields that are left out.
        derived: fields that an export adds, which are none of these.

    Raises:
        Refused: a column that is needed is missing or has another type, or a conversation or split is not as it must be.
    """
    schema = TABLES[schema_of(kind)]
    unknown.update(set(row) - set(schema.names) - set(derived))
    made = {name: row.get(name) for name in schema.names}
    try:
        (made,) = pa.Table.from_pylist([made], schema=schema).to_pylist()
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError, TypeError) as error:
        raise Refused("wrong_type", printable(str(error))) from None
    if missing := list(_missing(made, _NEEDED[kind])):
        raise Refused("missing_field", f"no {', '.join(dict.fromkeys(missing))}")
    _has_numbers(made)
    _has_tools(made)
    if kind in _TRAINED_ON and made["split"] not in ("train", "val"):
        raise Refused(
            "bad_example", f"split {printable(made['split'])}: a training set has train, and val for measuring the loss"
        )
    for name in schema.names:
        if schema.field(name).type == pa.list_(MESSAGE):
            _shows_its_images(made[name] or [])
    for name, role in _SAID_BY.get(kind, {}).items():
        if [message["role"] for message in made[name]] != [role]:
            raise Refused("bad_example", f"{name} is to be one message, of the {role}")
    if kind == "trajectories":
        _has_its_turns(made)
    if kind == "processed":
        _has_its_searches(made)
    return made


def known_split(split: str | None) -> str | None:
    """A row's own split: a name of the file that an export puts the row into.

    Raises:
        Refused: there is no such split.
    """
    if split is not None and split not in SPLITS:
        raise Refused("bad_split", f"split {printable(split)!r}")
    return split


def _missing(row: Mapping[str, Any], needed: Iterable[str], of: str = "") -> Iterator[str]:
    yield from (of + name for name in needed if row[name] is None)
    for name, inner in _NEEDED_OF_EACH.items():
        for item in row.get(name) or ():
            yield from [f"{of}{name}"] if item is None else _missing(item, inner, f"{of}{name}.")


def _has_numbers(row: Mapping[str, Any]) -> None:
    if row.get("top_k") is not None:
        records.whole(row["top_k"], "top_k", least=1)
    for name, value in row.items():
        for number in _floats(value):
            records.finite(number, name)


def _floats(value: Any) -> Iterator[float]:
    if isinstance(value, float):
        yield value
    elif isinstance(value, list | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _floats(inner)


def _has_tools(row: Mapping[str, Any]) -> None:
    try:
        tools = json.loads(row.get("tools") or "[]")
    except (ValueError, RecursionError):
        tools = None
    if not isinstance(tools, list):
        raise Refused("bad_json", "tools is no list in JSON")


def _shows_its_images(messages: Iterable[Mapping[str, Any] | None]) -> None:
    for message in messages:
        if message is None or message["role"] is None or message["content"] is None:
            raise Refused("bad_conversation", "a message has no role or no content")
        places, images = message["content"].count(PLACEHOLDER), len(images_of(message))
        if places != images:
            raise Refused(
                "bad_conversation", f"a message has {images} images and U+FFFC, which stands for one, {places} times"
            )


def _has_its_turns(row: Mapping[str, Any]) -> None:
    if row["status"] != "finished":
        return
    turns, earlier = len(row["turns"]), row["state_messages"] or 0
    spoken = turn_messages((message["role"] for message in row["messages"]), turns)
    if len(spoken) < turns:
        raise Refused("bad_conversation", f"{turns} turns, but {len(spoken)} messages of the assistant")
    first = spoken[0] if spoken else len(row["messages"])
    if not 0 <= earlier <= first:
        raise Refused("bad_conversation", f"it went on from {earlier} messages, but has {first} before its first turn")


def _has_its_searches(row: Mapping[str, Any]) -> None:
    places, searches = row["search_messages"], len(row["searches"])
    if {len(places), len(row["reasonings"])} != {searches}:
        raise Refused(
            "bad_conversation",
            f"{searches} searches, {len(places)} search_messages, {len(row['reasonings'])} reasonings",
        )
    if not all(at is not None and 0 <= at < len(row["messages"]) for at in places):
        raise Refused("bad_conversation", "search_messages are not places in messages")


def once(rows: Iterable[tuple[int, dict[str, Any]]], source: str, aside: list[SetAside]) -> Iterator[dict[str, Any]]:
    """Rows without those of a rollout that was there before."""
    seen: dict[str, int] = {}
    for number, row in rows:
        if (first := seen.setdefault(row["rollout_id"], number)) != number:
            aside.append(
                SetAside(source, number, "duplicate_id", f"{printable(row['rollout_id'])}, first in row {first}")
            )
        else:
            yield row


def note_unknown(unknown: Counter[str], source: str, aside: list[SetAside]) -> None:
    """Say which fields were left out, and how often."""
    for name, times in sorted(unknown.items()):
        aside.append(SetAside(source, None, "unknown_field", f"{printable(name)}, in {times} rows"))
