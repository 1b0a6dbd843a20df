"""Read one PDF, in a process of its own: whatever the file does to the reader stays there."""

import hashlib
from typing import Any, NamedTuple

from tasks import storage
from tasks.config.documents import MOST_OCR_BELOW
from tasks.errors import ConfigError
from tasks.processes import cpu_limit
from tasks.set_aside import Refused, printable

_NO_PICTURES = frozenset(
    {"fill-text", "stroke-text", "ignore-text", "stroke-path"}
)  # a stroke is a rule, or underlines


class Pdf(NamedTuple):
    """What was read of one PDF: its text page by page, or why it is refused. Holds no object of the PDF library."""

    sha256: str
    title: str
    texts: list[str]
    bad_pages: list[tuple[int, str]]  # page number from 1, why it could not be read
    refused: tuple[str, str] | None  # reason (tasks/set_aside.py), detail
    pictures: list[
        int
    ]  # numbers of the pages of little text on which images or filled shapes are drawn: text may be in them


def read_pdf(uri: str, cpu_limit_s: float) -> Pdf:
    """Text and title of the PDF at `uri`. Nothing that the file holds makes this raise.

    To be called in the main thread of a process of its own: a PDF that takes more than `cpu_limit_s` ends that process.

    Raises:
        ArtifactError, ConfigError, StorageError: the storage does not answer, or the file has gone.
    """
    import pymupdf  # noqa: F401 - takes a second, which is not the file's

    try:
        data = storage.read_bytes(uri)
    except MemoryError as error:
        return Pdf("", "", [], [], ("unreadable", _said(error)), [])
    except ConfigError as error:
        if not isinstance(error.__cause__, PermissionError):  # the storage refuses them all
            raise
        return Pdf("", "", [], [], ("unreadable", _said(error.__cause__)), [])
    digest = hashlib.sha256(data).hexdigest()
    try:
        with cpu_limit(cpu_limit_s):
            title, texts, bad_pages, pictures = _read(data)
    except Refused as refused:
        return Pdf(digest, "", [], [], (refused.reason, refused.detail), [])
    except Exception as error:  # noqa: BLE001 - the library has no common base, and the fault lies in the file
        return Pdf(digest, "", [], [], ("damaged", _said(error)), [])
    return Pdf(digest, title, texts, bad_pages, None, pictures)


def _read(data: bytes) -> tuple[str, list[str], list[tuple[int, str]], list[int]]:
    import pymupdf

    if not data:
        raise Refused("empty_file", "0 bytes")
    if b"%PDF" not in data[:1024]:
        raise Refused("not_pdf", "no %PDF in its first 1,024 bytes")
    complete = b"%%EOF" in data[-2048:]
    try:
        document = open_pdf(data)
    except pymupdf.FileDataError as error:
        raise Refused("damaged" if complete else "truncated", _said(error)) from error
    with document:
        if document.needs_pass:
            raise Refused("encrypted", "needs a password")
        # The library mends a file that was cut off by leaving out, or emptying, the pages that are lost.
        if document.is_repaired and not complete:
            raise Refused("truncated", f"{len(data):,} bytes without an end marker")
        if document.page_count == 0:
            raise Refused("no_pages", "0 pages")
        title = " ".join(_clean((document.metadata or {}).get("title") or "").split())
        texts, bad_pages, pictures = [], [], []
        # Ligatures are taken apart, so that a search for "finance" finds "ﬁnance".
        flags = pymupdf.TEXTFLAGS_TEXT & ~pymupdf.TEXT_PRESERVE_LIGATURES
        for number in range(1, document.page_count + 1):
            try:
                page = document[number - 1]
                texts.append(_clean(page.get_text("text", flags=flags)))
                # for the others, to look would take as long as to read
                if length(texts[-1]) < MOST_OCR_BELOW and {kind for kind, _ in page.get_bboxlog()} - _NO_PICTURES:
                    pictures.append(number)
            except Exception as error:  # noqa: BLE001 - one bad page must not cost the others
                texts.append("")
                bad_pages.append((number, _said(error)))
    return title, texts, bad_pages, pictures


def length(text: str) -> int:
    """How many characters a text has, white space not counted."""
    return len("".join(text.split()))


def _clean(text: Any) -> str:
    return str(text).encode("utf-8", "replace").decode("utf-8").replace("\x00", "")


def _said(error: Exception) -> str:
    return printable(f"{type(error).__name__}: {error}")


def open_pdf(data: bytes) -> Any:
    """A PDF as a document of PyMuPDF, which prints nothing of what is wrong with it.

    Raises:
        pymupdf.FileDataError: it is none, or damaged beyond repair.
    """
    import pymupdf

    pymupdf.TOOLS.mupdf_display_errors(False)
    pymupdf.TOOLS.mupdf_display_warnings(False)
    return pymupdf.open(stream=data, filetype="pdf")
