"""Documents to PDF: a small markup (paragraphs, ## headings, - bullets, | table rows) set on A4 pages by PyMuPDF."""

import io
from html import escape
from itertools import groupby

import pymupdf

from tasks.sample.family import Document, Page

_PAPER = pymupdf.paper_rect("a4")
_BODY = pymupdf.Rect(56, 64, _PAPER.x1 - 56, _PAPER.y1 - 56)
_HEADER = pymupdf.Rect(56, 30, _PAPER.x1 - 56, 56)
_FOOTER = pymupdf.Rect(56, _PAPER.y1 - 46, _PAPER.x1 - 56, _PAPER.y1 - 20)
_CSS = """
    body {font-family: sans-serif; font-size: 10pt; line-height: 1.35}
    h1 {font-size: 15pt; color: #1d3f5e} h2 {font-size: 11.5pt; color: #1d3f5e}
    table {width: 100%; border-collapse: collapse} th, td {border: 0.5px solid #8a98a5; padding: 3px; text-align: left}
    th {background-color: #e6ecf1} .small {font-size: 8pt; color: #5a6670}
"""
_DATE = "D:20240102090000Z"  # a fixed date, so that the same text gives the same bytes


def to_pdf(document: Document) -> bytes:
    """The document as a PDF; the same bytes each time."""
    stream = io.BytesIO()
    writer = pymupdf.DocumentWriter(stream)
    for number, page in enumerate(document.pages, start=1):
        device = writer.begin_page(_PAPER)
        footer = f"Page {number} of {len(document.pages)}"
        for area, html in ((_HEADER, _small(document.header)), (_BODY, to_html(page)), (_FOOTER, _small(footer))):
            story = pymupdf.Story(html, user_css=_CSS)
            overflows, _ = story.place(area)
            if overflows:
                raise ValueError(f"{document.file}: page {number} does not fit its paper")
            story.draw(device)
        writer.end_page()
    writer.close()
    with pymupdf.open("pdf", stream.getvalue()) as pdf:
        pdf.set_metadata({"title": document.title, "creationDate": _DATE, "modDate": _DATE})
        return bytes(pdf.tobytes(garbage=3, deflate=True, no_new_id=True))


def to_html(page: Page) -> str:
    """The page's heading and text in HTML.

    >>> to_html(Page("Fees", "Due\\nmonthly.\\n\\n| A & B |\\n| 5 |"))
    '<h1>Fees</h1><p>Due monthly.</p><table><tr><th>A &amp; B</th></tr><tr><td>5</td></tr></table>'
    """
    blocks = []
    for kind, lines in groupby(page.text.splitlines(), key=_kind):
        match kind:
            case "##":
                blocks += [f"<h2>{escape(line[2:].strip())}</h2>" for line in lines]
            case "-":
                items = "".join(f"<li>{escape(line[1:].strip())}</li>" for line in lines)
                blocks.append(f"<ul>{items}</ul>")
            case "|":
                rows = "".join(_row(line, "td" if at else "th") for at, line in enumerate(lines))
                blocks.append(f"<table>{rows}</table>")
            case "text":
                blocks.append(f"<p>{escape(' '.join(lines))}</p>")
    return f"<h1>{escape(page.heading)}</h1>" + "".join(blocks)


def _kind(line: str) -> str:
    if not line.strip():
        return ""
    return next((mark for mark in ("##", "-", "|") if line.startswith(mark)), "text")


def _row(line: str, cell: str) -> str:
    cells = "".join(f"<{cell}>{escape(text.strip())}</{cell}>" for text in line.strip(" |").split("|"))
    return f"<tr>{cells}</tr>"


def _small(text: str) -> str:
    return f'<p class="small">{escape(text)}</p>'
