"""pages/2 → the same, with the pages that have no text layer read by OCR, and set_aside/1 for those where that brought nothing.

A page is read once, ever: what was read lies in the storage by the hash of its PDF, by how it was read (language, resolution,
version of Tesseract, our code) and by its number. So an ingest that was killed goes on where it was, and one of other
documents or settings pays only for pages that are new.

Without Tesseract, documents are read all the same, and a table says how many pages of which wait for it: most collections hold
a few scans, and need not wait for an administrator. Only where no page has text is that an error; and so is a language that is
not installed, since somebody chose it.
"""

import contextlib
import functools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pyarrow as pa

from tasks import artifact, storage, tesseract
from tasks.artifact import Artifact
from tasks.cache import stage_key
from tasks.config import Scans
from tasks.errors import ArtifactError, ConfigError
from tasks.pdf import length, open_pdf
from tasks.processes import cores, cpu_limit, in_processes
from tasks.set_aside import SetAside, printable, write_set_aside
from tasks.source import Source, read_source, source_of
from tasks.tesseract import Reading, Tesseract

_RENDER_CPU_S = 60.0
_WORTH = 2  # OCR's text is taken where it is so many times as long as that of the text layer

Progress = Callable[[int, int], None]
Row = dict[str, Any]


class Scan(NamedTuple):
    """One page that is to be read."""

    source: Source
    number: int


class Method(NamedTuple):
    """How pages are read, and in which folder what was read is kept, under which name for this way of reading."""

    folder: str
    name: str
    language: str
    dpi: int


def read_scans(
    pages: Artifact,
    settings: Scans,
    documents: str | None,
    cache: str,
    uri: str,
    set_aside_uri: str,
    *,
    workers: int | None = None,
    on_progress: Progress = lambda done, total: None,
) -> tuple[Artifact, Artifact]:
    """Read the pages without a text layer into another pages/2 at `uri`; where there are none to read, `pages` stays.

    Args:
        documents: where the PDFs lie now, should they have moved since their text layer was read.
        cache: folder of what was read, of all collections.
        workers: processes; one per core when empty.
        on_progress: is called with (pages done, pages to read) after each one.

    Raises:
        ConfigError: a language is not installed; or Tesseract is not, and no page has text without it.
        InputError: a PDF has changed since its text layer was read, or has gone.
    """
    found = tesseract.installed()
    scans = 0 if settings.ocr == "off" else sum(_is_scan(row, settings) for row in _rows(pages))
    version = found.version if found else None  # which languages there are changes no page
    facts = artifact.provenance({"pages": pages}, stage="read scans", settings=settings.model_dump(), tesseract=version)
    notes: list[SetAside] = []
    if scans and found is None:
        notes = _waiting(pages, settings)
    elif scans and found is not None:
        method = _method(settings, found, cache)
        now = storage.resolve(documents) if documents else None
        todo = (
            Scan(source_of(row["file"], row["source_uri"], row["source_sha256"], now), row["page_number"])
            for row in _scans(pages, settings)
        )
        read = in_processes(functools.partial(_read, method=method), todo, workers or cores())
        merged = _merged(pages, settings, read, notes, lambda done: on_progress(done, scans))
        pages = artifact.write_tables(merged, uri, "pages/2", facts)
    notes += _without_text(pages, except_for={note.source for note in notes if note.reason == "ocr_missing"})
    return pages, write_set_aside(notes, set_aside_uri, facts)


def _rows(pages: Artifact) -> Iterator[Row]:
    columns = ("file", "page_number", "text", "source_uri", "source_sha256", "pictures")
    return (row for table in artifact.read_batches(pages, columns) for row in table.to_pylist())


def _scans(pages: Artifact, settings: Scans) -> Iterator[Row]:
    return (row for row in _rows(pages) if _is_scan(row, settings))


def _is_scan(row: Row, settings: Scans) -> bool:
    return bool(row["pictures"]) and length(row["text"]) < settings.ocr_below


# ---- what is installed


def _method(settings: Scans, found: Tesseract, cache: str) -> Method:
    languages = settings.ocr_language.split("+")
    if missing := [name for name in languages if name not in found.languages]:
        packages = " ".join("tesseract-ocr-" + name.lower().replace("_", "-") for name in missing)
        raise ConfigError(
            f"pages without a text layer are to be read as {settings.ocr_language}, but Tesseract has only "
            f"{', '.join(found.languages) or 'no language'}: install {', '.join(missing)} (Debian: apt-get install {packages}), "
            "or choose another --ocr-language"
        )
    way = {"tesseract": found.version, "language": settings.ocr_language, "dpi": settings.ocr_dpi}
    name = stage_key("tasks.tesseract", facts=way)
    return Method(cache, name, settings.ocr_language, settings.ocr_dpi)


def _waiting(pages: Artifact, settings: Scans) -> list[SetAside]:
    """Notes of the documents that have pages which only OCR can read, where it is not installed."""
    counts = Counter(row["file"] for row in _scans(pages, settings))
    if not any(row["text"].strip() for row in _rows(pages)):
        raise ConfigError(
            f"none of the {pages.rows:,} pages has a text layer, and Tesseract, which could read them, is not installed: "
            "install it (Debian: apt-get install tesseract-ocr)"
        )
    return [SetAside(file, None, "ocr_missing", f"{count} pages") for file, count in counts.items()]


# ---- reading


def _read(scan: Scan, method: Method) -> Reading | str:
    """What is on a page, from the storage if it was read before; or why it could not be read, which is not kept.

    To be called in the main thread of a process of its own: a page that takes too long to render ends that process.
    """
    kept = storage.join(method.folder, scan.source.sha256, method.name, f"{scan.number}.json")
    with contextlib.suppress(ArtifactError, ValueError):  # not there yet, or no JSON
        return Reading(**json.loads(storage.read_bytes(kept)))
    document = _document(scan.source)
    try:
        with cpu_limit(_RENDER_CPU_S):  # Tesseract's own time is not this process's
            reading = tesseract.read_page(document[scan.number - 1], method.language, method.dpi)
    except Exception as error:  # noqa: BLE001 - the libraries have no common base, and one bad page must not cost the others
        return printable(f"{type(error).__name__}: {error}")
    storage.write_bytes(kept, json.dumps(reading._asdict()).encode())
    return reading


@functools.lru_cache(maxsize=1)  # pages come in their order, so a process opens a document once
def _document(source: Source) -> Any:
    return open_pdf(read_source(source))


# ---- what becomes of it


def _merged(
    pages: Artifact,
    settings: Scans,
    read: Iterator[tuple[Scan, Reading | str | None]],
    notes: list[SetAside],
    on_done: Callable[[int], None],
) -> Iterator[pa.Table]:
    """All pages, with what was `read` in place of the text of scans, in whose order it comes."""
    done = 0
    for table in artifact.read_batches(pages):
        rows = table.to_pylist()
        for row in rows:
            if not _is_scan(row, settings):
                continue
            _, reading = next(read)
            if not isinstance(reading, Reading):
                why = reading or f"the process that rendered it ended, or took {_RENDER_CPU_S:.0f} s"
                notes.append(SetAside(row["file"], row["page_number"], "ocr_failed", why))
            elif length(reading.text) >= max(1, _WORTH * length(row["text"])):
                row |= {"text": reading.text, "text_source": "ocr", "confidence": reading.confidence}
            elif not row["text"].strip():
                notes.append(SetAside(row["file"], row["page_number"], "no_words", f"language {settings.ocr_language}"))
            done += 1
            on_done(done)
        yield artifact.table_of(rows, "pages/2")


def _without_text(pages: Artifact, except_for: set[str]) -> list[SetAside]:
    """Notes of the PDFs no page of which has text."""
    counts, with_text = Counter[str](), set[str]()
    for row in _rows(pages):
        if row["source_uri"] is not None:
            counts[row["file"]] += 1
            if row["text"].strip():
                with_text.add(row["file"])
    return [
        SetAside(file, None, "no_text", f"{count} pages")
        for file, count in counts.items()
        if file not in with_text and file not in except_for
    ]
