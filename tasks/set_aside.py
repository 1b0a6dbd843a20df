"""What of the input could not be used, and why: counted and shown at the end of ingest, never fatal by itself."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from tasks import artifact
from tasks.artifact import Artifact

REASONS: dict[str, str] = {
    # files
    "bad_name": "The name is empty, too long, or has '..', '.', control characters or broken UTF-8: rename the file.",
    "not_pdf": "It is not a PDF.",
    "empty_file": "It has no bytes.",
    "truncated": "It ends before its end: copy it again.",
    "damaged": "It starts like a PDF but cannot be opened: save it again with the program that made it.",
    "encrypted": "It needs a password: save it without one.",
    "no_pages": "It is a PDF of no pages.",
    "unreadable": "It may not be read: change its permissions.",
    "crashed": "The PDF reader died or hung on it: save it again with another program.",
    # files that are kept
    "no_text": "No page has text, so no search finds it.",
    "unreadable_page": "This page could not be read and counts as empty.",
    "ocr_missing": "Pages without a text layer, and no Tesseract to read them: install it (Debian: tesseract-ocr), ingest again.",
    "ocr_failed": "OCR crashed or hung on this page, which counts as without text; the next ingest that reads scans tries again.",
    "no_pdf": "The OCR file has it, and no PDF of it could be used: it is kept as text alone, without images of its pages.",
    "no_ocr_row": "The OCR file has no rows for pages of this PDF: they are read as without one.",
    "no_words": "OCR found no words on this page, so no search finds it.",
    # rows
    "bad_json": "The row is not a JSON object.",
    "broken_utf8": "The row is not UTF-8.",
    "missing_field": "A field is missing.",
    "wrong_type": "A field has the wrong type.",
    "bad_number": "A number is too large, too small, infinite or NaN.",
    "bad_page_number": "The page number is below 1 or beyond the document's end.",
    "duplicate_page": "The page was there before; the first one counts.",
    # rows of questions
    "duplicate_id": "The question id was there before; the first one counts.",
    "empty_question": "The question has no words.",
    "bad_answers": "Answers are neither a text, a list of texts nor a list of lists of texts, or are empty.",
    "bad_location": "An answer location is neither {document, page} nor 'file:page'.",
    "unknown_document": "The answer lies in a document that is not among the pages.",
    "unknown_page": "The answer lies on a page that its document does not have.",
    "excluded": "The include or exclude list leaves it out.",
    # rows of what is imported
    "bad_conversation": "The conversation lacks turns, images, words or its question, or is not told as the agent's.",
    "bad_example": "The text is no example of its format, or of neither part of a training set.",
    "held_out": "Its question is of the dev or test split here, which nothing may learn from.",
    "bad_split": "Its split is none of train, dev and test.",
    "bad_image": "A page image that it shows is not beside it, or not what its name and the row say.",
    # what is kept
    "unknown_field": "No such field is known, so it was left out.",
    "rank_differs": "The answer's rank is not where it stands in the results, which are what counts.",
    # questions that are kept
    "location_dropped": "One of its answer locations is wrong; the others are kept.",
}
KEPT = frozenset(
    {
        *("no_text", "unreadable_page", "ocr_missing", "ocr_failed", "no_pdf", "no_ocr_row", "no_words"),
        *("location_dropped", "unknown_field", "rank_differs"),
    }
)  # noted, not set aside


class SetAside(NamedTuple):
    """One thing that could not be used. `row` counts from 1: a line of a file, or a page of a PDF."""

    source: str
    row: int | None
    reason: str
    detail: str


class Refused(Exception):
    """Why one file or row cannot be used; caught where rows are read, and noted as SetAside."""

    def __init__(self, reason: str, detail: str) -> None:
        assert reason in REASONS, reason
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def printable(text: str, limit: int = 200) -> str:
    """`text` on one line of valid UTF-8, cut at `limit` characters, so that any bytes can stand in a table or message."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: limit + 1])
    return shown if len(shown) <= limit else shown[:limit] + "…"


def write_set_aside(found: Iterable[SetAside], uri: str, facts: Mapping[str, Any]) -> Artifact:
    """Write set_aside/1 at `uri`, sorted, so that the order in which things were read does not matter."""
    rows = sorted(found, key=lambda s: (s.source, s.row or 0, s.reason, s.detail))
    return artifact.write_table(
        artifact.table_of([s._asdict() for s in rows], "set_aside/1"), uri, "set_aside/1", facts
    )


class Count(NamedTuple):
    """How often one reason came up; `kept` when it was only noted."""

    reason: str
    times: int
    kept: bool
    meaning: str
    example: str


def count_reasons(*artifacts: Artifact) -> list[Count]:
    """The table that ingest ends with: one line a reason, most frequent first."""
    rows = [row for a in artifacts for row in artifact.read_rows(a)]
    examples: dict[str, str] = {}
    for row in rows:
        where = row["source"] if row["row"] is None else f"{row['source']}, row {row['row']}"
        examples.setdefault(row["reason"], f"{where}: {row['detail']}")
    counts = Counter(row["reason"] for row in rows)
    return [
        Count(reason, count, reason in KEPT, REASONS[reason], examples[reason])
        for reason, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    ]


def first_reasons(found: Iterable[SetAside]) -> str:
    """The first three things set aside, for the error that says that nothing was left."""
    return "; ".join(
        f"{s.source}{'' if s.row is None else f', row {s.row}'}: {s.reason} ({s.detail})" for s in list(found)[:3]
    )
