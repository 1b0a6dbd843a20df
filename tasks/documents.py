"""A folder or s3:// prefix of PDFs, or OCR JSONL → pages/2, and set_aside/1 for what could not be used.

`file` is a document's path below the folder, with forward slashes. The order is (file, page), whatever order files are
listed or rows stand in, so the same documents give the same bytes.
"""

import functools
import hashlib
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute

from tasks import artifact, records, storage
from tasks.artifact import Artifact
from tasks.config import Ingest
from tasks.errors import InputError
from tasks.pdf import Pdf, read_pdf
from tasks.processes import cores, in_processes
from tasks.set_aside import Refused, SetAside, first_reasons, printable, write_set_aside

CPU_LIMIT_S = 120.0
"""A PDF that keeps a core busy for longer is set aside as crashed; a thousand pages take about two seconds."""

_BATCH_ROWS = 2048

Progress = Callable[[int, int], None]


def read_documents(
    settings: Ingest, uri: str, set_aside_uri: str, on_progress: Progress | None = None
) -> tuple[Artifact, Artifact]:
    """Read all documents into pages/2 at `uri`, and note at `set_aside_uri` what could not be used.

    Args:
        on_progress: is called with (PDFs done, PDFs in all) after each one; OCR JSONL has no such steps.

    Raises:
        InputError: there is no such folder or file, or nothing in it can be used.
    """
    set_aside: list[SetAside] = []
    if settings.documents.endswith(".jsonl"):
        pages = _ocr_pages(settings.documents, set_aside)
    else:
        pages = _pdf_pages(settings, set_aside, on_progress or (lambda done, total: None))
    facts = artifact.provenance(stage="ingest documents")
    written = artifact.write_tables(pages, uri, "pages/2", facts)
    return written, write_set_aside(set_aside, set_aside_uri, facts)


def check_name(name: str) -> None:
    """Refuse a document name that could leave its folder, break a line, or exist on no disk.

    Raises:
        Refused: why.
    """
    try:
        encoded = name.encode("utf-8")
    except UnicodeEncodeError:
        raise Refused("bad_name", "not UTF-8") from None
    segments = name.split("/")
    if any(segment in ("", ".", "..") for segment in segments):
        raise Refused("bad_name", "has an empty, '.' or '..' part")
    if any(unicodedata.category(c) in ("Cc", "Zl", "Zp") for c in name):
        raise Refused("bad_name", "has control characters")
    # The limits of file systems (a part) and of S3 (the whole).
    if any(len(segment.encode("utf-8")) > 255 for segment in segments) or len(encoded) > 1024:
        raise Refused("bad_name", f"{len(encoded)} bytes")


# ---- PDFs


def _pdf_pages(settings: Ingest, set_aside: list[SetAside], on_progress: Progress) -> Iterator[pa.Table]:
    root = storage.resolve(settings.documents)
    files = _pdf_files(root, set_aside)
    batch: list[dict[str, Any]] = []
    usable = False
    read = in_processes(
        functools.partial(read_pdf, cpu_limit_s=CPU_LIMIT_S), files.values(), settings.workers or cores()
    )
    for done, (name, (_, content)) in enumerate(zip(files, read, strict=True), start=1):
        pdf = content or Pdf("", "", [], [], ("crashed", f"its reading process ended, or took {CPU_LIMIT_S:.0f} s"), [])
        if pdf.refused is not None:
            set_aside.append(SetAside(name, None, *pdf.refused))
        else:
            usable = True
            batch += _rows_of(name, files[name], pdf)
            set_aside += [SetAside(name, page, "unreadable_page", detail) for page, detail in pdf.bad_pages]
        if len(batch) >= _BATCH_ROWS:
            yield artifact.table_of(batch, "pages/2")
            batch = []
        on_progress(done, len(files))
    if not usable:
        there = "it is empty" if not storage.is_s3(root) and Path(root).is_dir() else "nothing lies there"
        found = f"nothing in it could be used: {first_reasons(set_aside)}" if set_aside else there
        raise InputError(f"no usable PDF; {found}", file=settings.documents)
    yield artifact.table_of(batch, "pages/2")


def _pdf_files(root: str, set_aside: list[SetAside]) -> dict[str, str]:
    """Name → URI of the files to read, in the order of names; what is no candidate is set aside."""
    files = {}
    closed: list[str] = []
    for uri in storage.iter_files(root, closed):
        name = storage.relative(uri, root)
        if uri.endswith("/"):  # S3's marker of an empty folder
            continue
        try:
            check_name(name)
            if not name.lower().endswith(".pdf"):
                raise Refused("not_pdf", "its name does not end in .pdf")
        except Refused as refused:
            set_aside.append(SetAside(printable(name), None, refused.reason, refused.detail))
        else:
            files[name] = uri
    for folder in closed:
        name = printable(storage.relative(folder, root))
        set_aside.append(SetAside(name, None, "unreadable", "a folder that may not be listed"))
    return dict(sorted(files.items()))


def _rows_of(name: str, uri: str, pdf: Pdf) -> list[dict[str, Any]]:
    pictures = set(pdf.pictures)
    return [
        {
            "file": name,
            "page_number": number,
            "total_pages": len(pdf.texts),
            "title": pdf.title or PurePosixPath(name).stem,
            "text": text,
            "text_source": "pdf",
            "source_uri": uri,
            "source_sha256": pdf.sha256,
            "pictures": number in pictures,
        }
        for number, text in enumerate(pdf.texts, start=1)
    ]


# ---- OCR JSONL


def _ocr_pages(uri: str, set_aside: list[SetAside]) -> Iterator[pa.Table]:
    source = printable(uri.rsplit("/", 1)[-1])
    seen: dict[bytes, int] = {}
    batches: list[pa.Table] = []
    batch: list[dict[str, Any]] = []
    for row, page in records.parse(records.read_jsonl(uri), _ocr_page, source, set_aside):
        key = hashlib.sha256(f"{page['file']}\n{page['page_number']}".encode()).digest()
        if key in seen:
            where = printable(f"{page['file']}, page {page['page_number']}")
            set_aside.append(SetAside(source, row, "duplicate_page", f"{where}, first in row {seen[key]}"))
            continue
        seen[key] = row
        batch.append(page)
        if len(batch) >= _BATCH_ROWS:
            batches.append(artifact.table_of(batch, "pages/2"))
            batch = []
    if not seen:
        raise InputError(f"no usable page; {first_reasons(set_aside) or 'the file is empty'}", file=uri)
    table = pa.concat_tables([*batches, artifact.table_of(batch, "pages/2")])
    yield from _in_order(table)


def _in_order(table: pa.Table) -> Iterator[pa.Table]:
    order = pa.compute.sort_indices(table, sort_keys=[("file", "ascending"), ("page_number", "ascending")])
    for start in range(0, len(order), _BATCH_ROWS):
        yield table.take(order[start : start + _BATCH_ROWS])


def _ocr_page(record: dict[str, Any]) -> dict[str, Any]:
    """One page of the reference pipeline's OCR JSONL: {file, page_number, total_pages, text}."""
    name = records.field(record, "file")
    if not isinstance(name, str):
        raise Refused("wrong_type", f"file is a {type(name).__name__}, not a text")
    check_name(name)
    number = records.whole(records.field(record, "page_number"), "page_number")
    total = records.whole(records.field(record, "total_pages"), "total_pages")
    if not 1 <= number <= total:
        raise Refused("bad_page_number", f"page {number} of {total}")
    return {
        "file": name,
        "page_number": number,
        "total_pages": total,
        "title": PurePosixPath(name).stem,
        "text": records.text(records.field(record, "text"), "text"),
        "text_source": "ocr_jsonl",
        "source_uri": None,
        "source_sha256": None,
    }
