"""One page → the text that Tesseract reads on it, and how sure it is.

PyMuPDF renders the page; the program `tesseract` reads the picture and answers with a table of words, each with a
confidence. PyMuPDF can run Tesseract itself (Page.get_textpage_ocr, Pixmap.pdfocr_tobytes), but hands on the words alone: its
confidences stay inside, and a page on which it hangs cannot be given up without ending the process.

This module imports nothing of the project, so that pages that were read once are read again only when reading changes.
"""

import os
import re
import shutil
import subprocess
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import pymupdf

_DEADLINE_S = 300.0  # of a reading, which takes about two seconds on a core of its own; what takes longer is given up
_MOST_PIXELS = 40_000_000  # more than A3 at 300 dpi; a page of metres is rendered more coarsely, not in gigabytes
_UNSURE = 0.5  # a page read upside down comes out at 0.3, one that is mostly a photograph at 0.65
_AS_IT_STANDS, _TURNED_AS_FOUND = "3", "1"  # page segmentation modes: without and with detection of the orientation
_WORD = "5"  # level of a word in the table


class Tesseract(NamedTuple):
    """What is installed."""

    version: str
    languages: tuple[str, ...]


class Reading(NamedTuple):
    """What was read: lines of text, and the mean confidence of its words, 0 to 1; None where there is no word."""

    text: str
    confidence: float | None


class NotRead(Exception):
    """Tesseract crashed or hung on this page, or refused it; says how."""


def installed() -> Tesseract | None:
    """The Tesseract that is installed, or None."""
    if not shutil.which("tesseract"):
        return None
    said = subprocess.run(["tesseract", "--version"], capture_output=True, text=True, check=False)
    version = re.search(r"^tesseract v?(\S+)", said.stdout + said.stderr, re.MULTILINE)
    listed = subprocess.run(["tesseract", "--list-langs"], capture_output=True, text=True, check=False)
    # below a line of title; older versions print to stderr
    languages = (listed.stdout or listed.stderr).splitlines()[1:]
    return Tesseract(version[1] if version else "unknown", tuple(sorted(filter(None, map(str.strip, languages)))))


def read_page(page: "pymupdf.Page", languages: str, dpi: int) -> Reading:
    """Read a page as it is shown, its /Rotate obeyed; a scan that lies on its head or side is turned.

    The orientation is looked for only where the first reading is unsure, for that costs half as much again.

    Args:
        languages: Tesseract's names, joined by "+".

    Raises:
        NotRead: Tesseract did not.
    """
    picture, dpi = _render(page, dpi)
    reading = _read(picture, languages, dpi, _AS_IT_STANDS)
    if reading.confidence is None or reading.confidence >= _UNSURE:
        return reading
    try:
        turned = _read(picture, languages, dpi, _TURNED_AS_FOUND)
    except NotRead:  # an installation without the data for this (osd) refuses; the first reading is there
        return reading
    return turned if (turned.confidence or 0) > reading.confidence else reading


def _render(page: "pymupdf.Page", dpi: int) -> tuple[bytes, int]:
    """The page as a grey picture (PNM), and its resolution."""
    import pymupdf  # takes a second, and the command line can do without

    square_inches = page.rect.width * page.rect.height / 72**2
    dpi = max(1, min(dpi, int((_MOST_PIXELS / square_inches) ** 0.5)))
    pixmap = page.get_pixmap(dpi=dpi, colorspace=pymupdf.csGRAY)
    return pixmap.tobytes("pnm"), dpi


def _read(picture: bytes, languages: str, dpi: int, mode: str) -> Reading:
    # below 70 Tesseract takes a resolution for a mistake and guesses
    command = ["tesseract", "stdin", "stdout", "-l", languages, "--dpi", str(max(70, dpi)), "--psm", mode, "tsv"]
    try:
        done = subprocess.run(
            command,
            input=picture,
            capture_output=True,
            timeout=_DEADLINE_S,
            check=False,
            env=os.environ | {"OMP_THREAD_LIMIT": "1"},  # a page a core is faster than a page on all cores
        )
    except subprocess.TimeoutExpired:
        raise NotRead(f"it took longer than {_DEADLINE_S:.0f} s") from None
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise NotRead(f"it ended with code {done.returncode}: {said[-1] if said else 'and said nothing'}")
    return _reading(done.stdout.decode("utf-8", "replace"))


def _reading(table: str) -> Reading:
    """The text of Tesseract's table of words, a line a line, with an empty line between paragraphs."""
    text, confidences, last = "", [], ("", "")
    for row in table.splitlines()[1:]:
        cells = row.split("\t")  # level, page, block, paragraph, line, word, left, top, width, height, confidence, text
        if cells[0] != _WORD or not (word := cells[11].strip()):
            continue
        paragraph, line = ".".join(cells[2:4]), cells[4]
        if text:
            text += "\n\n" if paragraph != last[0] else "\n" if line != last[1] else " "
        text += word
        confidences.append(float(cells[10]) / 100)
        last = (paragraph, line)
    return Reading(text, round(sum(confidences) / len(confidences), 4) if confidences else None)
