"""The PDFs that pages came from, read again later: for an image of a page, or for what OCR finds on it."""

import hashlib
from dataclasses import dataclass

from tasks import storage
from tasks.errors import ArtifactError, InputError


@dataclass(frozen=True)
class Source:
    """The PDF that a page came from: its document's name, where it may lie, and the hash of its bytes."""

    file: str
    uris: tuple[str, ...]
    sha256: str


def source_of(file: str, uri: str, sha256: str, documents: str | None) -> Source:
    """A document's PDF.

    Args:
        uri: where it was read; pages that are read once know only that place.
        documents: the folder where documents lie now, if it is known.
    """
    now = [storage.join(documents, file)] if documents else []
    return Source(file, tuple(dict.fromkeys([uri, *now])), sha256)


def read_source(source: Source) -> bytes:
    """The PDF's bytes, from the first place that has them.

    Raises:
        InputError: it lies at none of its places, or another does.
        StorageError, ConfigError: the storage does not answer.
    """
    said = []
    for uri in source.uris:
        try:
            data = storage.read_bytes(uri)
        except ArtifactError:
            said.append(f"nothing lies at {uri}")
            continue
        if hashlib.sha256(data).hexdigest() == source.sha256:
            return data
        said.append(f"{uri} is not what was ingested")
    raise InputError(
        f"its pages cannot be read again: {'; '.join(said)}. Put it back, or run ingest with the folder where the documents "
        "lie now",
        file=source.file,
    )
