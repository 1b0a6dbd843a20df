"""Our own rows out of JSONL or Parquet: what an export wrote, checked again as if anybody had.

A row holds the columns of its schema (tasks/schemas.py), whatever is null being optional; other fields are left out and
counted. What makes it unusable further on, such as a conversation with fewer turns than the row says, or without
images that it speaks of, refuses it.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from tasks import records, storage
from tasks.agent.message import PLACEHOLDER, images_of
from tasks.errors import InputError
from tasks.records import Record
from tasks.schemas import MESSAGE, TABLES
from tasks.set_aside import Refused, SetAside, printable

_NEEDED = {
    "trajectories": ("rollout_id", "question_id", "question", "status", "top_k", "turns", "messages"),
    "processed": ("rollout_id", "question_id", "question", "top_k", "searches", "reasonings", "messages"),
    "pairs": ("question_id", "question", "source", "chosen", "rejected", "chosen_score", "rejected_score"),
    "sft": ("question_id", "split", "format", "prompt", "completion"),
    "dpo": ("question_id", "split", "prompt", "chosen", "rejected"),
    "reward": ("question_id", "split", "prompt", "completion", "score"),
}

_TRAINED_ON = ("sft", "dpo", "reward")
_QUERIES = {"dpo": ("chosen", "rejected"), "reward": ("completion",)}


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


def provenance_beside(source: str) -> str | None:
    """The provenance.json of an export, in the folder or beside the file; None where there is none."""
    folder = source.rsplit("/", 1)[0] if storage.is_file(source) else source
    uri = storage.join(folder, "provenance.json")
    return uri if storage.is_file(uri) else None


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
    if missing := [name for name in _NEEDED[kind] if row.get(name) is None]:
        raise Refused("missing_field", f"no {', '.join(missing)}")
    made = {name: row.get(name) for name in schema.names}
    try:
        (made,) = pa.Table.from_pylist([made], schema=schema).to_pylist()
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError, TypeError) as error:
        raise Refused("wrong_type", printable(str(error))) from None
    if kind in _TRAINED_ON and made["split"] not in ("train", "val"):
        raise Refused(
            "bad_example", f"split {printable(made['split'])}: a training set has train, and val for measuring the loss"
        )
    for name in schema.names:
        if schema.field(name).type == pa.list_(MESSAGE):
            _shows_its_images(made[name] or [])
    for name in _QUERIES.get(kind, ()):
        if [message["role"] for message in made[name]] != ["assistant"]:
            raise Refused("bad_example", f"{name} is to be one message, of the assistant")
    if kind == "trajectories":
        _has_its_turns(made)
    return made


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
    spoken = sum(message["role"] == "assistant" for message in row["messages"])
    if row["status"] == "finished" and spoken < len(row["turns"]):
        raise Refused("bad_conversation", f"{len(row['turns'])} turns, but {spoken} messages of the assistant")


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
