"""Page images that go along with rows: out of the storage, each once, by the hash of its bytes; and back into it.

    images/<sha256>.png      beside JSONL
    images/unsplit.parquet   in a data set: {"key": "images/<sha256>.png", "image"}, where `datasets` sees an image

An exported row has these names as its images' keys. What comes in is taken for what its hash and its pixels say it is, and is
stored apart from what was rendered here: <root>/page-images/imported/<sha256>.png.
"""

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tasks import images, records, storage
from tasks.agent.message import Image, images_of
from tasks.errors import ArtifactError
from tasks.schemas import MESSAGE, TABLES
from tasks.set_aside import Refused, printable

NAME = "images"
_NAMED = re.compile(rf"{NAME}/([0-9a-f]{{64}})\.(png|jpg)")
_FORMATS = {"png": "PNG", "jpg": "JPEG"}
_AT_ONCE = 64  # images in memory together
_SCHEMA = pa.schema(
    [("key", pa.string()), ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))],
    metadata={
        "huggingface": json.dumps(
            {"info": {"features": {"key": {"dtype": "string", "_type": "Value"}, "image": {"_type": "Image"}}}}
        )
    },
)

Row = dict[str, Any]


def columns_of(schema: str) -> list[str]:
    """The columns that hold messages, which may show images.

    >>> columns_of("dpo/3")
    ['prompt', 'chosen', 'rejected']
    """
    return [field.name for field in TABLES[schema] if field.type == pa.list_(MESSAGE)]


def are_shown(table: pa.Table, columns: list[str]) -> bool:
    """Whether any message in these columns shows an image."""
    messages = (pc.list_flatten(table[column]) for column in columns)
    return any(len(pc.list_flatten(pc.struct_field(found, "images"))) for found in messages)


def with_images(row: Row, columns: list[str], change: Callable[[Image], Image]) -> Row:
    """A row in whose messages every image is what `change` makes of it."""

    def changed(message: Mapping[str, Any]) -> Mapping[str, Any]:
        shown = images_of(message)
        return {**message, "images": [change(image) for image in shown]} if shown else message

    return {**row, **{column: [changed(message) for message in row[column]] for column in columns if row[column]}}


class Given:
    """Images on their way out: files below a local folder, once each."""

    def __init__(self, root: str, folder: Path) -> None:
        self._root, self._folder = root, folder
        self._names: dict[str, str] = {}

    def give(self, image: Image) -> Image:
        """The image under the name that it has there; its file is written unless it is there.

        Raises:
            ArtifactError: it is no longer in the storage.
        """
        key = image["key"]
        if key not in self._names:
            if ".." in PurePosixPath(key).parts:
                raise ArtifactError(f"{key} is no page image of this storage; make what shows it again")
            data = storage.read_bytes(storage.join(self._root, key))
            name = self._names[key] = f"{NAME}/{hashlib.sha256(data).hexdigest()}{PurePosixPath(key).suffix}"
            (self._folder / NAME).mkdir(exist_ok=True)
            (self._folder / name).write_bytes(data)
        return {**image, "key": self._names[key]}

    def files(self) -> list[Path]:
        """What was written, in the names' order."""
        return [self._folder / name for name in sorted(set(self._names.values()))]

    def pack(self, file: Path) -> int:
        """Put the files into one table, which takes their place; returns how many they are."""
        files = self.files()
        with pq.ParquetWriter(file, _SCHEMA) as writer:
            for at in range(0, len(files), _AT_ONCE):
                rows = [_packed(f"{NAME}/{one.name}", one.read_bytes()) for one in files[at : at + _AT_ONCE]]
                writer.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA))
        for one in files:
            one.unlink()
        return len(files)


def _packed(key: str, data: bytes) -> Row:
    return {"key": key, "image": {"bytes": data, "path": key}}


def images_beside(source: str) -> str | None:
    """The folder of page images beside a file; None where there is none. A data set's are in its own folder."""
    uri = storage.join(source.rpartition("/")[0], NAME)
    return uri if storage.is_file(source) and storage.exists(uri) else None


class Taken:
    """Images on their way in: those beside a file, or in a data set's folder."""

    def __init__(self, source: str, root: str) -> None:
        self._root, self._packed = root, not storage.is_file(source)
        self._folder = source if self._packed else source.rpartition("/")[0]
        self._sizes: dict[str, tuple[int, int]] | None = None if self._packed else {}

    def take(self, image: Image) -> Image:
        """The image as it is stored here.

        Raises:
            Refused: it is not there, or not what its name or the row says.
        """
        image = _checked(image)
        key = image["key"]
        named = _NAMED.fullmatch(key)
        if named is None:
            raise Refused("bad_image", f"{printable(key)} is no name of the form {NAME}/<sha256>.png")
        if self._sizes is None:
            self._sizes = dict(self._unpack())
        if key not in self._sizes:
            try:
                data = b"" if self._packed else storage.read_bytes(storage.join(self._folder, key))
            except ArtifactError:
                data = b""
            if not data:
                raise Refused(
                    "bad_image", f"{key} is not there: import what lies beside it, or the folder of its data set"
                )
            self._sizes[key] = self._store(key, data)
        if self._sizes[key] != (image["width"], image["height"]):
            raise Refused("bad_image", f"{key} is not {image['width']} × {image['height']} pixels")
        return {**image, "key": _stored_at(key)}

    def _unpack(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Store all images of a data set that are what they are called."""
        for file in storage.iter_files(storage.join(self._folder, NAME)):
            if not file.endswith(".parquet"):
                continue
            for _, row in records.read_parquet(file):
                if isinstance(row, Refused) or not _NAMED.fullmatch(str(row.get("key"))):
                    continue
                try:
                    yield row["key"], self._store(row["key"], (row.get("image") or {}).get("bytes") or b"")
                except Refused:  # the rows that show it are refused, each by its number
                    continue

    def _store(self, key: str, data: bytes) -> tuple[int, int]:
        """Store one image; returns its width and height in pixels."""
        from PIL import Image as Picture

        named = _NAMED.fullmatch(key)
        assert named is not None
        if hashlib.sha256(data).hexdigest() != named[1]:
            raise Refused("bad_image", f"{key} has other bytes than its name says")
        try:
            with Picture.open(io.BytesIO(data), formats=[_FORMATS[named[2]]]) as picture:
                size = picture.size
        except (OSError, ValueError, SyntaxError, Picture.DecompressionBombError) as error:
            raise Refused("bad_image", f"{key} cannot be read as an image ({printable(str(error))})") from None
        uri = storage.join(self._root, _stored_at(key))
        if not storage.is_file(uri):
            storage.write_bytes(uri, data)
        return size


def _checked(image: Any) -> Image:
    if not isinstance(image, Mapping):
        raise Refused("bad_image", "one of its images is no object")
    texts = {name: records.text(image.get(name), name) for name in ("file", "key")}
    numbers = {name: records.whole(image.get(name), name) for name in ("page", "width", "height")}
    return Image(**texts, **numbers)  # type: ignore[typeddict-item]


def _stored_at(key: str) -> str:
    return images.imported(key.removeprefix(f"{NAME}/"))
