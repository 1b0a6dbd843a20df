"""Look up a page of pages/2: its text, and the file that it can be rendered from."""

import hashlib
from typing import Any

import pyarrow as pa

from tasks import artifact
from tasks.artifact import Artifact
from tasks.errors import ArtifactError

_COLUMNS = ("file", "page_number", "text", "source_uri", "source_sha256")


class PageStore:
    """Pages by (file, page number from 1). Texts stay in Arrow's buffers; only the keys are Python objects."""

    def __init__(self, pages: Artifact) -> None:
        """Load `pages`.

        Raises:
            ArtifactError: it is missing, or is no pages artifact.
        """
        if pages.schema != "pages/2":
            raise ArtifactError(f"{pages.uri} is {pages.schema!r}, not 'pages/2': run ingest")
        self._table: pa.Table = artifact.read_table(pages, _COLUMNS)
        self._rows: dict[str, dict[int, int]] = {}  # file → page number → row
        places = zip(self._table["file"].to_pylist(), self._table["page_number"].to_pylist(), strict=True)
        for row, (file, number) in enumerate(places):
            self._rows.setdefault(file, {})[number] = row

    def __contains__(self, page: tuple[str, int]) -> bool:
        """Whether a (file, page number) is there."""
        file, number = page
        return number in self._rows.get(file, ())

    def has_file(self, file: str) -> bool:
        """Whether any page of the document is there."""
        return file in self._rows

    def files(self) -> list[str]:
        """Names of all documents, in their order."""
        return list(self._rows)

    def text(self, file: str, page: int) -> str:
        """The page's text.

        Raises:
            ArtifactError: there is no such page.
        """
        if (file, page) not in self:
            raise ArtifactError(f"the pages hold no page {page} of {file!r}: build the index again from these pages")
        return self._table["text"][self._rows[file][page]].as_py()

    def text_hash(self, file: str) -> str | None:
        """Hash of the document's text, page by page; None where no page has any."""
        digest, blank = hashlib.sha256(), True
        for _, row in sorted(self._rows[file].items()):
            text = self._table["text"][row].as_py() or ""
            blank = blank and not text.strip()
            digest.update(text.encode() + b"\0")
        return None if blank else digest.hexdigest()

    def source(self, file: str) -> str | None:
        """Path or s3:// URI of the PDF that the document's pages can be rendered from; None where there is no PDF.

        Raises:
            ArtifactError: there is no such document.
        """
        return self._of_document("source_uri", file)

    def source_sha256(self, file: str) -> str | None:
        """Hash of that PDF's bytes; None where there is no PDF.

        Raises:
            ArtifactError: there is no such document.
        """
        return self._of_document("source_sha256", file)

    def _of_document(self, column: str, file: str) -> Any:
        if file not in self._rows:
            raise ArtifactError(f"the pages hold no document {file!r}: build the index again from these pages")
        return self._table[column][next(iter(self._rows[file].values()))].as_py()
