"""The reference that goes between stages, and the only way to write and read what it refers to.

An artifact is a Parquet file, a folder of Parquet part files, or a folder of files (an index, an adapter). Its schema
is declared in tasks/schemas.py and checked on write and on read; its provenance lies in the Parquet metadata, or in
`provenance.json` inside a folder.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tasks import folders, storage
from tasks.errors import ArtifactError
from tasks.schemas import FOLDERS, TABLES

PACKAGES = (
    "drag",
    "pyarrow",
    "pymupdf",
    "tantivy",
    "whoosh-reloaded",
    "openai",
    "transformers",
    "torch",
    "trl",
    "peft",
    "anls-star",
)
_PROVENANCE = b"drag.provenance"
_SCHEMA = b"drag.schema"


@dataclass(frozen=True)
class Artifact:
    """A reference to stored data: where it lies, the hash of its bytes, its number of rows, and its declared schema."""

    uri: str
    sha256: str
    rows: int
    schema: str


def provenance(inputs: Mapping[str, Artifact] | None = None, **facts: Any) -> dict[str, Any]:
    """What an artifact was made from: its inputs' hashes, configuration and other JSON-able facts, package versions.

    Holds no time and no host name, so that the same work gives the same bytes.
    """
    hashes = {name: artifact.sha256 for name, artifact in (inputs or {}).items()}
    return {"inputs": hashes, "packages": versions(*PACKAGES), **facts}


def versions(*packages: str) -> dict[str, str | None]:
    """The installed versions of these packages; None for one that is not installed, as the training packages are an extra."""
    found: dict[str, str | None] = dict.fromkeys(packages)
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _declared(schema: str) -> pa.Schema:
    if schema not in TABLES:
        raise ArtifactError(f"no table schema {schema!r} is declared in tasks/schemas.py")
    return TABLES[schema]


def _checked(table: pa.Table, schema: str) -> pa.Table:
    declared = _declared(schema)
    missing = set(declared.names) - set(table.column_names)
    extra = set(table.column_names) - set(declared.names)
    if missing or extra:
        raise ArtifactError(
            f"table is not {schema}: missing columns {sorted(missing)}, unknown columns {sorted(extra)}"
        )
    try:
        return table.select(declared.names).cast(declared)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ArtifactError(f"table is not {schema}: {error}") from error


def table_of(rows: Iterable[Mapping[str, Any]], schema: str) -> pa.Table:
    """Rows as an Arrow table of a declared schema; what a row leaves out is null.

    Raises:
        ArtifactError: a row has a value of another type, or one that the schema has no column for.
    """
    declared, listed = _declared(schema), list(rows)
    if unknown := {name for row in listed for name in row} - set(declared.names):
        raise ArtifactError(f"rows are not {schema}: unknown columns {sorted(unknown)}")
    try:
        return pa.Table.from_pylist(listed, schema=declared)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError) as error:
        raise ArtifactError(f"rows are not {schema}: {error}") from error


def write_table(table: pa.Table, uri: str, schema: str, facts: Mapping[str, Any]) -> Artifact:
    """Write one Parquet file at `uri` (ends in .parquet), checked against its declared schema.

    Raises:
        ArtifactError: the table is not of that schema.
    """
    return write_tables([table], uri, schema, facts)


def write_tables(tables: Iterable[pa.Table], uri: str, schema: str, facts: Mapping[str, Any]) -> Artifact:
    """Write one Parquet file from tables that come one after the other, so that of these only one need be in memory, beside
    the compressed file; they may add to `facts` as they come.

    Raises:
        ArtifactError: a table is not of that schema.
    """
    declared = _declared(schema).with_metadata({_SCHEMA: schema.encode()})
    buffer, rows = io.BytesIO(), 0
    with pq.ParquetWriter(buffer, declared, compression="zstd") as writer:
        for table in tables:
            writer.write_table(_checked(table, schema).replace_schema_metadata(declared.metadata))
            rows += table.num_rows
        writer.add_key_value_metadata({_PROVENANCE: json.dumps(facts, sort_keys=True, default=str).encode()})
    data = buffer.getvalue()
    storage.write_bytes(uri, data)
    return Artifact(uri, hashlib.sha256(data).hexdigest(), rows, schema)


def _open_file(uri: str, schema: str, sha256: str | None = None) -> pq.ParquetFile:
    data = storage.read_bytes(uri)
    if sha256 is not None:
        _refuse_altered(uri, hashlib.sha256(data).hexdigest(), sha256)
    try:
        file = pq.ParquetFile(io.BytesIO(data))
    except (pa.ArrowInvalid, OSError) as error:  # pyarrow raises OSError for some damages
        raise ArtifactError(
            f"{uri} is not Parquet or damaged ({error}): delete it, and the next run makes it again"
        ) from error
    found = (file.schema_arrow.metadata or {}).get(_SCHEMA, b"").decode()
    if found != schema:
        raise ArtifactError(
            f"{uri} holds {found or 'a table that DRAG did not write'!r}, this version reads {schema!r}: make it again"
        )
    return file


def _refuse_altered(uri: str, found: str, sha256: str) -> None:
    if found != sha256:
        raise ArtifactError(
            f"{uri} hashes to {found[:12]}, its reference says {sha256[:12]}: it was altered or damaged; delete it, and the "
            "next run makes it again"
        )


def _open(artifact: Artifact) -> Iterator[pq.ParquetFile]:
    """The Parquet files of a table artifact; that of a one-file artifact must hash to what its reference says."""
    if artifact.schema not in TABLES:
        raise ArtifactError(
            f"{artifact.uri} is {artifact.schema!r}; this version reads {sorted(TABLES)}: make it again"
        )
    files = [f for f in storage.iter_files(artifact.uri) if f.endswith(".parquet")]
    if not files:
        raise ArtifactError(f"{artifact.uri} does not exist; run the stage that makes it again")
    for uri in files:
        yield _open_file(uri, artifact.schema, artifact.sha256 if artifact.uri.endswith(".parquet") else None)


def _read(file: pq.ParquetFile, columns: Sequence[str] | None) -> pa.Table:
    return file.read(columns=list(columns) if columns is not None else None).replace_schema_metadata(None)


Part = tuple[str, int, dict[str, Any]]
"""One of several Parquet files: where it lies, how many rows it has, and the facts that it was written with."""


def open_parts(uri: str, schema: str, columns: Sequence[str] | None = None) -> tuple[pa.Table, list[Part]]:
    """All Parquet files at or below `uri`, in name order, as one table, empty when there is none; and what each is."""
    tables, parts = [], []
    for file_uri in (f for f in storage.iter_files(uri) if f.endswith(".parquet")):
        file = _open_file(file_uri, schema)
        tables.append(_read(file, columns))
        parts.append((file_uri, tables[-1].num_rows, json.loads(file.metadata.metadata[_PROVENANCE])))
    declared = TABLES[schema].empty_table()
    return pa.concat_tables(tables) if tables else declared.select(list(columns or declared.column_names)), parts


def read_parts(uri: str, schema: str, columns: Sequence[str] | None = None) -> pa.Table:
    """That table alone."""
    return open_parts(uri, schema, columns)[0]


def read_table(artifact: Artifact, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a table artifact, or some of its columns.

    Raises:
        ArtifactError: it is missing, was altered, or has another schema than this version of the code reads.
    """
    return pa.concat_tables([_read(file, columns) for file in _open(artifact)])


def read_batches(artifact: Artifact, columns: Sequence[str] | None = None, rows: int = 1024) -> Iterator[pa.Table]:
    """A table artifact, or some of its columns, in tables of at most `rows` rows, so that of these only one need be in
    memory, beside the compressed file.

    Raises:
        ArtifactError: as `read_table`.
    """
    for file in _open(artifact):
        for batch in file.iter_batches(rows, columns=list(columns) if columns is not None else None):
            yield pa.Table.from_batches([batch]).replace_schema_metadata(None)


def read_rows(artifact: Artifact, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """A table artifact as a list of dictionaries."""
    return read_table(artifact, columns).to_pylist()


def read_provenance(artifact: Artifact) -> dict[str, Any]:
    """The provenance that an artifact was written with."""
    if artifact.schema in FOLDERS:
        return json.loads(storage.read_bytes(storage.join(artifact.uri, "provenance.json")))
    return json.loads(_stored_provenance(artifact))


@functools.lru_cache(maxsize=64)  # the whole file is read and hashed for it, and several ask
def _stored_provenance(table: Artifact) -> bytes:
    """The provenance in a table's bytes, which its hash names."""
    return next(_open(table)).metadata.metadata[_PROVENANCE]


def _folder_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
        digest.update(storage.file_sha256(path))
    return digest.hexdigest()


def write_folder(folder: Path, uri: str, schema: str, rows: int, facts: Mapping[str, Any]) -> Artifact:
    """Store a local folder of files as an artifact; its reference is written last, so a cut-off upload is never read.

    Over another artifact, whose reference is removed first: what points to that one finds nothing, and no mixture of both.

    Raises:
        ArtifactError: `schema` is not a declared folder schema.
    """
    if schema not in FOLDERS:
        raise ArtifactError(f"no folder schema {schema!r} is declared in tasks/schemas.py")
    (folder / "provenance.json").write_text(json.dumps(facts, sort_keys=True, indent=1, default=str))
    artifact = Artifact(uri, _folder_hash(folder), rows, schema)
    if not exists(artifact):  # the same bytes over themselves are no mixture at any time
        storage.delete(_folder_ref(uri))
    storage.upload_folder(folder, uri)
    for file in list(storage.iter_files(uri)):  # what an earlier artifact left at the same place
        if not (folder / storage.relative(file, uri)).is_file():
            storage.delete(file)
    storage.clear_unfinished(uri)
    written = {"sha256": artifact.sha256, "rows": rows, "schema": schema}
    storage.write_bytes(_folder_ref(uri), json.dumps(written, indent=1).encode())
    return artifact


def _folder_ref(uri: str) -> str:
    """Where the reference of a folder artifact lies that was written whole: beside the folder."""
    return uri.rstrip("/") + ".artifact.json"


def fetch_folder(artifact: Artifact) -> Path:
    """A local path that holds a folder artifact's files: its own when storage is local, else a copy downloaded once.

    The files' hash is checked on download only: engines leave lock files in a folder that they open where it lies.

    Raises:
        ArtifactError: it is missing, was not written whole or was written over, or what was downloaded does not hash to what
            the reference says.
    """
    if artifact.schema not in FOLDERS:
        raise ArtifactError(f"{artifact.uri} is {artifact.schema!r}, not one of {sorted(FOLDERS)}: make it again")
    if not exists(artifact):
        raise ArtifactError(
            f"{artifact.uri} does not exist, or no longer holds what its reference says; run the stage that makes it again"
        )
    if not storage.is_s3(artifact.uri):
        return Path(artifact.uri)
    cache = folders.cache_folder() / "folders"
    target = cache / artifact.sha256
    if target.is_dir():
        return target
    with folders.scratch("download", cache) as part:
        made = part / "folder"
        storage.download_folder(artifact.uri, made)
        _refuse_altered(artifact.uri, _folder_hash(made), artifact.sha256)
        try:
            made.rename(target)
        except OSError:  # another process fetched it meanwhile
            if not target.is_dir():
                raise
    return target


def exists(artifact: Artifact) -> bool:
    """Whether what a (perhaps cached) reference points to is still there; a folder, whether it was written whole since."""
    if artifact.schema in FOLDERS:
        try:
            written = json.loads(storage.read_bytes(_folder_ref(artifact.uri)))
        except ArtifactError:
            return False
        if written["sha256"] != artifact.sha256:
            return False
    return storage.exists(artifact.uri)
