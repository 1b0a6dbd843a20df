"""A folder or s3:// prefix of PDFs, OCR JSONL, or both → pages/2, and set_aside/1 for what could not be used.

`file` is a document's path below the folder, with forward slashes. The order is (file, page), whatever order files are
listed or rows stand in, so the same documents give the same bytes.

Of both, a PDF says which pages a document has, and its pages can be shown as images; the OCR file says what stands on those
that it has rows for, be it nothing. A page without a row has the PDF's own text, a document without a PDF no images; both are
noted. A row beyond the PDF's last page is set aside, for then the two are not of the same document.
"""

import functools
import itertools
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pyarrow as pa

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
Row = dict[str, Any]


class _OcrPage(NamedTuple):
    """A page of an OCR file, and the row that it stands in."""

    row: int
    total_pages: int
    text: str


_OcrPages = dict[int, _OcrPage]  # by page number


def read_documents(
    settings: Ingest,
    uri: str,
    set_aside_uri: str,
    on_progress: Progress = lambda done, total: None,
    *,
    sources: Mapping[str, str] | None = None,
) -> tuple[Artifact, Artifact]:
    """Read all documents into pages/2 at `uri`, and note at `set_aside_uri` what could not be used.

    Args:
        on_progress: is called with (PDFs done, PDFs in all) after each one; an OCR file has no such steps.
        sources: what is read → hash of its content, for the provenance.

    Raises:
        InputError: there is no such folder or file, nothing in it can be used, or the OCR file is about none of the PDFs.
    """
    set_aside: list[SetAside] = []
    ocr = _read_ocr(settings.ocr_file, set_aside) if settings.ocr_file else {}
    if settings.documents:
        pages = _pdf_pages(settings, ocr, set_aside, on_progress)
    else:
        pages = (row for name in sorted(ocr) for row in _ocr_rows(name, ocr[name]))
    facts = artifact.provenance(stage="ingest documents", sources=sources or {})
    written = artifact.write_tables(_tables(pages), uri, "pages/2", facts)
    return written, write_set_aside(set_aside, set_aside_uri, facts)


def _tables(rows: Iterable[Row]) -> Iterator[pa.Table]:
    rows = iter(rows)
    while batch := list(itertools.islice(rows, _BATCH_ROWS)):
        yield artifact.table_of(batch, "pages/2")


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


def _pdf_pages(
    settings: Ingest, ocr: Mapping[str, _OcrPages], set_aside: list[SetAside], on_progress: Progress
) -> Iterator[Row]:
    """The pages of the PDFs, with the texts of an OCR file; and the documents that this alone has."""
    assert settings.documents is not None
    refused: list[SetAside] = []
    files = _pdf_files(storage.resolve(settings.documents), refused)
    if ocr and files and not files.keys() & ocr.keys():
        raise InputError(
            f"none of its documents is a PDF of {settings.documents}: a row's file is the PDF's path below that folder, such as "
            f"{next(iter(files))!r}, and not {next(iter(ocr))!r}",
            file=settings.ocr_file,
        )
    work = functools.partial(read_pdf, cpu_limit_s=CPU_LIMIT_S)
    read = in_processes(work, files.values(), settings.workers or cores())
    crashed = Pdf("", "", [], [], ("crashed", f"its reading process ended, or took {CPU_LIMIT_S:.0f} s"), [])
    done, usable = 0, False
    for name in sorted({*files, *ocr}):
        pdf = (next(read)[1] or crashed) if name in files else None
        if pdf is not None and pdf.refused is None:
            usable = True
            yield from _rows_of(name, files[name], pdf, ocr.get(name, {}), settings.ocr_file, set_aside)
        elif name in ocr:
            set_aside.append(SetAside(name, None, "no_pdf", f"{len(ocr[name])} pages"))
            yield from _ocr_rows(name, ocr[name])
        if pdf is not None:
            if pdf.refused is not None:
                refused.append(SetAside(name, None, *pdf.refused))
            done += 1
            on_progress(done, len(files))
    if not usable:
        root = storage.resolve(settings.documents)
        there = "it is empty" if not storage.is_s3(root) and Path(root).is_dir() else "nothing lies there"
        found = f"nothing in it could be used: {first_reasons(refused)}" if refused else there
        raise InputError(f"no usable PDF; {found}", file=settings.documents)
    set_aside += refused


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


def _rows_of(
    name: str, uri: str, pdf: Pdf, ocr: _OcrPages, ocr_file: str | None, set_aside: list[SetAside]
) -> Iterator[Row]:
    """The pages of a PDF, with the texts of its OCR where there are any."""
    pages = len(pdf.texts)
    pictures = set(pdf.pictures)
    set_aside += [SetAside(name, page, "unreadable_page", detail) for page, detail in pdf.bad_pages if page not in ocr]
    if ocr_file:
        if lacking := sum(number not in ocr for number in range(1, pages + 1)):
            set_aside.append(SetAside(name, None, "no_ocr_row", f"{lacking} of {pages} pages"))
        for number, page in ocr.items():
            if number > pages:
                detail = printable(f"page {number} of {name}, a PDF of {pages} pages")
                set_aside.append(SetAside(_shown(ocr_file), page.row, "bad_page_number", detail))
    for number, text in enumerate(pdf.texts, start=1):
        read = ocr.get(number)
        yield {
            "file": name,
            "page_number": number,
            "total_pages": pages,
            "title": pdf.title or PurePosixPath(name).stem,
            "text": read.text if read else text,
            "text_source": "ocr_jsonl" if read else "pdf",
            "source_uri": uri,
            "source_sha256": pdf.sha256,
            "pictures": None if read else number in pictures,  # or our OCR would read it again
        }


# ---- OCR JSONL


def _read_ocr(uri: str, set_aside: list[SetAside]) -> dict[str, _OcrPages]:
    """The pages of an OCR file by document."""
    documents: dict[str, _OcrPages] = {}
    for row, (name, number, total, text) in records.parse(records.read_jsonl(uri), _ocr_page, _shown(uri), set_aside):
        pages = documents.setdefault(name, {})
        if number in pages:
            where = printable(f"{name}, page {number}")
            set_aside.append(SetAside(_shown(uri), row, "duplicate_page", f"{where}, first in row {pages[number].row}"))
        else:
            pages[number] = _OcrPage(row, total, text)
    if not documents:
        raise InputError(f"no usable page; {first_reasons(set_aside) or 'the file is empty'}", file=uri)
    return documents


def _shown(uri: str) -> str:
    return printable(uri.rsplit("/", 1)[-1])


def _ocr_page(record: Row) -> tuple[str, int, int, str]:
    """(document, page number, pages in all, text) of a row of the reference pipeline's OCR JSONL."""
    name = records.field(record, "file")
    if not isinstance(name, str):
        raise Refused("wrong_type", f"file is a {type(name).__name__}, not a text")
    check_name(name)
    number = records.whole(records.field(record, "page_number"), "page_number")
    total = records.whole(records.field(record, "total_pages"), "total_pages")
    if not 1 <= number <= total:
        raise Refused("bad_page_number", f"page {number} of {total}")
    return name, number, total, records.text(records.field(record, "text"), "text")


def _ocr_rows(name: str, pages: _OcrPages) -> Iterator[Row]:
    """The pages of a document of which there is no PDF."""
    for number, page in sorted(pages.items()):
        yield {
            "file": name,
            "page_number": number,
            "total_pages": page.total_pages,
            "title": PurePosixPath(name).stem,
            "text": page.text,
            "text_source": "ocr_jsonl",
        }
