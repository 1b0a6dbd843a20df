"""Build an index of pages as an artifact, open it, search it.

An index folder holds `meta.json` (the engine's name, the number of pages), `pages.parquet` (file and page number by ordinal,
that is in order of (file, page number)) and `engine/`, which only the engine reads.
"""

import importlib
import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from tasks import artifact, config, folders
from tasks.artifact import Artifact
from tasks.errors import ArtifactError, ConfigError
from tasks.search import ENGINES

_KEY = ["file", "page_number"]
_COLUMNS = [*_KEY, "title", "text"]


@dataclass(frozen=True)
class Hit:
    """One page that a search found: rank from 1, page number from 1, score (higher is better)."""

    rank: int
    file: str
    page_number: int
    score: float


@dataclass(frozen=True)
class SearchResult:
    """What a search found, best first; the string that was really searched; and whether it was read as a query."""

    hits: tuple[Hit, ...]
    searched: str
    read_as: Literal["query", "words"]


def _engine(name: str) -> Any:
    if name not in ENGINES:
        raise ConfigError(f"no search engine is called {name!r}; there are {sorted(ENGINES)}")
    return importlib.import_module(ENGINES[name].module)


def _in_order(pages: Artifact, keys: pa.Table) -> Iterator[pa.Table]:
    """Batches of the pages in order of (file, page number): as they lie where that is their order, else sorted."""
    order = keys.sort_by([(name, "ascending") for name in _KEY])
    if order.equals(keys):
        yield from map(_own_titles, artifact.read_batches(pages, _COLUMNS))
    else:
        table = artifact.read_table(pages, _COLUMNS).sort_by([(name, "ascending") for name in _KEY])
        yield from (_own_titles(pa.Table.from_batches([batch])) for batch in table.to_batches(1024))


def _own_titles(table: pa.Table) -> pa.Table:
    """Without the titles that are only the file's name: its words would count twice, as file and as title."""
    files, titles = table["file"].to_pylist(), table["title"].to_pylist()
    own = ["" if title == PurePosixPath(file).stem else title for file, title in zip(files, titles, strict=True)]
    return table.set_column(table.schema.get_field_index("title"), "title", pa.array(own, pa.string()))


def build_index(pages: Artifact, settings: config.Index, uri: str) -> Artifact:
    """Index a pages/2 artifact into a folder artifact index/1 at `uri`; its rows are the number of pages.

    Raises:
        ArtifactError: the pages are missing, or of another schema.
        ConfigError: there is no such engine.
    """
    if pages.schema != "pages/2":
        raise ArtifactError(f"{pages.uri} is {pages.schema!r}; an index is made of 'pages/2'")
    engine = _engine(settings.engine)
    with folders.scratch("index") as folder:
        keys = artifact.read_table(pages, _KEY)
        pq.write_table(
            keys.sort_by([(name, "ascending") for name in _KEY]), folder / "pages.parquet", compression="zstd"
        )
        (folder / "engine").mkdir()
        engine.build(_in_order(pages, keys), folder / "engine")
        meta = {"engine": settings.engine, "pages": keys.num_rows}
        (folder / "meta.json").write_text(json.dumps(meta, indent=1))
        facts = artifact.provenance({"pages": pages}, settings=settings.model_dump())
        return artifact.write_folder(folder, uri, "index/1", keys.num_rows, facts)


class Searcher:
    """An open index and the settings that queries are read with. Safe to share between threads."""

    def __init__(self, index: Artifact, settings: config.Search) -> None:
        from tasks.search import query

        self.index, self.settings = index, settings
        folder = artifact.fetch_folder(index)
        self._language = query  # imported here, for it loads Whoosh
        engine = _engine(json.loads((folder / "meta.json").read_text())["engine"])
        weights = {"text": 1.0, "file": settings.file_boost, "title": settings.title_boost}
        self._blocking: bool = engine.blocking
        self._engine = engine.Engine(folder / "engine", {field: weight for field, weight in weights.items() if weight})
        pages = pq.read_table(folder / "pages.parquet")
        files = pages["file"].combine_chunks().dictionary_encode()
        # by ordinal; plain Python values, because a search returns a few of them in microseconds
        self._names: list[str] = files.dictionary.to_pylist()
        self._files = array("L", files.indices.to_numpy())
        self._numbers = array("L", pages["page_number"].to_numpy())

    def holds_up(self, query: str) -> bool:
        """Whether a search takes long enough that asynchronous code should call it in a thread.

        Whoosh may take a second for any query. tantivy takes about a millisecond for plain words, less than a thread takes to
        hand its answer over to a busy loop; for patterns, ranges and the like, which may match every page, up to hundreds.
        """
        return self._blocking or not self._language.is_plain(query)

    def search(self, query: str, top_k: int, question: str | None = None) -> SearchResult:
        """The `top_k` best pages for a query. Never raises for anything in the query.

        `question` is what the query was made for; its words are added to a query without operators where the settings say
        expand="question" (with operator="and" they add to the score and are not required).
        Hits are ordered by score, ties (scores that agree to four decimals) by file and page number.
        """
        language = self._language
        if question and self.settings.expand == "question" and not language.has_operators(query):
            reading = language.read_with(query, question, self.settings.operator)
        else:
            reading = language.read(query, self.settings.operator)
        found = self._engine.find(reading.tree, top_k) if reading.tree is not None else []
        hits = tuple(
            Hit(rank, self._names[self._files[ordinal]], self._numbers[ordinal], score)
            for rank, (ordinal, score) in enumerate(found, 1)
        )
        return SearchResult(hits, reading.searched, reading.read_as)


def open_index(index: Artifact, settings: config.Search) -> Searcher:
    """Open an index artifact for searching; one on S3 is downloaded once.

    Raises:
        ArtifactError: it is missing, was altered, or is no index.
        ConfigError: it was built by an engine that this version does not have.
    """
    if index.schema != "index/1":
        raise ArtifactError(f"{index.uri} is {index.schema!r}, not 'index/1': run the stage that builds the index")
    return Searcher(index, settings)
