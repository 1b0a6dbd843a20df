"""Rows of files that others wrote, read one at a time and trusted in nothing.

A reader yields (row number from 1, the row as a dictionary, or the Refused that says why it is none).
"""

import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from tasks import storage
from tasks.errors import InputError
from tasks.schemas import LARGEST
from tasks.set_aside import Refused, SetAside, printable

Record = tuple[int, dict[str, Any] | Refused]
T = TypeVar("T")


def _json_object(line: bytes) -> dict[str, Any] | Refused:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Refused("broken_utf8", f"byte {error.start} of the row")
    except (ValueError, RecursionError) as error:
        return Refused("bad_json", f"{printable(str(error))}; a line is one object")
    return value if isinstance(value, dict) else Refused("bad_json", f"a {type(value).__name__}, not an object")


def read_jsonl(uri: str) -> Iterator[Record]:
    """Rows of a JSONL file; the row number is the line's. Blank lines and a byte order mark are passed over.

    Raises:
        InputError: there is no such file.
        ConfigError: it may not be read.
    """
    if not storage.is_file(uri):
        raise InputError("there is no such file; check the path", file=uri)
    for row, line in enumerate(storage.read_lines(uri), start=1):
        content = line.removeprefix(b"\xef\xbb\xbf") if row == 1 else line
        if content.strip():
            yield row, _json_object(content)


def read_parquet(uri: str) -> Iterator[Record]:
    """Rows of a Parquet file.

    Raises:
        InputError: there is no such file, or it is not Parquet.
    """
    if not storage.is_file(uri):
        raise InputError("there is no such file; check the path", file=uri)
    try:
        yield from rows_of(pq.ParquetFile(io.BytesIO(storage.read_bytes(uri))).iter_batches(batch_size=1024))
    except (pa.ArrowInvalid, OSError) as error:  # pyarrow raises OSError for damaged pages
        raise InputError(f"not a Parquet file, or a damaged one ({printable(str(error))})", file=uri) from error


def rows_of(batches: Iterable[pa.RecordBatch]) -> Iterator[Record]:
    """The rows of Arrow batches, numbered from 1."""
    row = 0
    for batch in batches:
        for index in range(batch.num_rows):
            row += 1
            yield row, _row_of(batch, index)


def _row_of(batch: pa.RecordBatch, index: int) -> dict[str, Any] | Refused:
    try:
        return batch.slice(index, 1).to_pylist()[0]
    except UnicodeDecodeError:  # Parquet does not check that its texts are UTF-8
        return Refused("broken_utf8", "a text of the row")


def parse(
    records: Iterable[Record], read: Callable[[dict[str, Any]], T], source: str, set_aside: list[SetAside]
) -> Iterator[tuple[int, T]]:
    """What `read` makes of each row; rows that it, or the file reader, refuses are appended to `set_aside`."""
    for row, record in records:
        try:
            if isinstance(record, Refused):
                raise record
            value = read(record)
        except Refused as refused:
            set_aside.append(SetAside(source, row, refused.reason, refused.detail))
        else:
            yield row, value


def field(record: Mapping[str, Any], *names: str) -> Any:
    """The value under the first of `names` that is there and not null.

    Raises:
        Refused: there is none.
    """
    value = next((record[name] for name in names if record.get(name) is not None), None)
    if value is None:
        raise Refused("missing_field", f"no {' or '.join(names)}")
    return value


def text(value: Any, name: str) -> str:
    """`value` as text without NUL characters, which neither prompts nor terminals take.

    Raises:
        Refused: it is no text, or one that UTF-8 cannot hold (JSON can spell half a surrogate pair).
    """
    if not isinstance(value, str):
        raise Refused("wrong_type", f"{name} is a {type(value).__name__}, not a text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise Refused("broken_utf8", f"{name} holds half a surrogate pair") from None
    return value.replace("\x00", "")


def identifier(value: Any, name: str) -> str:
    """`value`, a text or a whole number, as text.

    Raises:
        Refused: it is neither.
    """
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else text(value, name)


def whole(value: Any, name: str, least: int = -LARGEST - 1) -> int:
    """`value` as a whole number that a column holds.

    Raises:
        Refused: it is none (true and false are none either), or is too large, or below `least`.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise Refused("wrong_type", f"{name} is a {type(value).__name__}, not a whole number")
    if not least <= value <= LARGEST:
        raise Refused("bad_number", f"{name} is not between {least} and {LARGEST}")
    return value


def finite(value: Any, name: str) -> float:
    """`value` as a number that can be reckoned with.

    Raises:
        Refused: it is none (true and false are none either), or is too large, infinite or NaN.
    """
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise Refused("wrong_type", f"{name} is a {type(value).__name__}, not a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise Refused("bad_number", f"{name} is too large, infinite or NaN")
    return number
