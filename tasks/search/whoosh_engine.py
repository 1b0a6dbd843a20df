"""Whoosh answers the reduced tree (tasks/search/query.py): the reference engine, in Python, hundreds of times slower.

It scores as tantivy does: BM25 with k1 = 1.2, b = 0.75 and idf = ln(1 + (N - n + 0.5) / (n + 0.5)); patterns, ranges, page
numbers and *:* score their boost. All matches are scored: Whoosh's own collector skips blocks of postings that cannot reach
the top, and would have to be trusted with ties. A document's number is its page's ordinal.
"""

import heapq
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from whoosh import analysis as whoosh_analysis
from whoosh import fields, index, matching, query, scoring

from tasks.search import analysis
from tasks.search.analysis import FIELDS, written
from tasks.search.query import ANY, PAGE
from tasks.search.whoosh_pickles import only_what_whoosh_writes

blocking = True
_MEGABYTES = 256  # of postings in memory while indexing
_DECIMALS = 4  # as the tantivy engine
K1, B = 1.2, 0.75


class Analyzer(whoosh_analysis.Analyzer):
    """The shared analyzer as Whoosh calls it. Whoosh stores it in the index by name, so it holds nothing but its form."""

    def __init__(self, form: analysis.Form) -> None:
        self.form = form

    def __call__(self, value: str, **_: Any) -> Iterator[whoosh_analysis.Token]:
        token = whoosh_analysis.Token(positions=True, boost=1.0, stopped=False)
        for token.text, token.pos in analysis.placed(value, self.form):
            yield token


class Bm25(scoring.BM25F):
    """Whoosh's BM25F with the idf that tantivy and Lucene use."""

    def idf(self, searcher: Any, fieldname: str, text: bytes) -> float:
        pages, found = searcher.doc_count_all(), searcher.doc_frequency(fieldname, text)
        return math.log(1 + (pages - found + 0.5) / (found + 0.5))


class Without(query.AndNot):
    """ANDNOT by a set of pages: Whoosh's own matcher forgets to look whether the first match is excluded."""

    def matcher(self, searcher: Any, context: Any = None) -> matching.Matcher:
        excluded = set(self.b.matcher(searcher, searcher.boolean_context()).all_ids())
        return matching.FilterMatcher(self.a.matcher(searcher, context), excluded, exclude=True)


class GappedPhrase(query.Phrase):
    """A phrase whose words stand at exact distances (None is any one word), scored by how often it occurs, as in tantivy."""

    def _and_query(self) -> query.And:  # what Whoosh estimates the number of matches by
        return query.And([query.Term(self.fieldname, word) for word in self.words if word is not None])

    def matcher(self, searcher: Any, context: Any = None) -> matching.Matcher:
        field = searcher.schema[self.fieldname]
        placed = [(place, field.to_bytes(word)) for place, word in enumerate(self.words) if word is not None]
        starts: dict[int, set[int]] | None = None
        for place, word in placed:
            if (self.fieldname, word) not in searcher.reader():
                return matching.NullMatcher()
            found = _positions(searcher.postings(self.fieldname, word), place, starts)
            starts = {page: at & starts[page] for page, at in found.items()} if starts is not None else found
        counts = {page: len(at) for page, at in sorted((starts or {}).items()) if at}
        idf = sum(searcher.idf(self.fieldname, word) for _, word in placed)
        average = searcher.avg_field_length(self.fieldname)
        scores = [
            self.boost * scoring.bm25(idf, count, searcher.doc_field_length(page, self.fieldname, 1), average, B, K1)
            for page, count in counts.items()
        ]
        return matching.ListMatcher(list(counts), weights=scores)


def _positions(postings: Any, place: int, within: dict[int, set[int]] | None) -> dict[int, set[int]]:
    """Where a phrase would start if its word at `place` is the one that these postings are of, by page."""
    found = {}
    while postings.is_active():
        if within is None or postings.id() in within:
            found[postings.id()] = {at - place for at in postings.value_as("positions")}
        postings.next()
    return found


def _schema() -> fields.Schema:
    columns: dict[str, fields.FieldType] = {PAGE: fields.NUMERIC(int)}
    for field in FIELDS:
        columns[field] = fields.TEXT(analyzer=Analyzer("stems"), phrase=True)
        columns[written(field)] = fields.TEXT(analyzer=Analyzer("written"), phrase=False)
    return fields.Schema(**columns)


def build(pages: Iterator[pa.Table], folder: Path) -> None:
    """Index pages, which come in order of their ordinals, into an empty folder, as one segment."""
    writer = index.create_in(str(folder), _schema()).writer(limitmb=_MEGABYTES)
    for table in pages:
        for *texts, number in zip(*(table[name].to_pylist() for name in (*FIELDS, PAGE)), strict=True):
            document = {PAGE: number}
            for field, text in zip(FIELDS, texts, strict=True):
                document[field] = document[written(field)] = text or ""
            writer.add_document(**document)
    writer.commit()


class Engine:
    """An open index. `weights` are the fields that a word with no field is looked for in. One search at a time."""

    def __init__(self, folder: Path, weights: dict[str, float]) -> None:
        with only_what_whoosh_writes():
            self._searcher = index.open_dir(str(folder), schema=_schema()).searcher(weighting=Bm25(B=B, K1=K1))
        self._weights = weights
        self._lock = threading.Lock()  # Whoosh's readers share file positions and caches

    def find(self, tree: query.Query, top_k: int) -> list[tuple[int, float]]:
        """Ordinals and scores of the best pages, best first, ties in order of their ordinals."""
        with self._lock, only_what_whoosh_writes():
            matcher = self._query(tree).matcher(self._searcher, self._searcher.context())
            best = heapq.nsmallest(top_k, ((-round(score, _DECIMALS), page) for page, score in _scored(matcher)))
        return [(page, -score) for score, page in best]

    def _query(self, node: query.Query) -> query.Query:
        match node:
            case query.Or():
                return query.Or([self._query(sub) for sub in node.subqueries])
            case query.And():
                return query.And([self._query(sub) for sub in node.subqueries])
            case query.AndNot():
                return Without(self._query(node.a), self._query(node.b))
            case query.AndMaybe() | query.Require():
                return type(node)(self._query(node.a), self._query(node.b))
            case query.Every():
                return query.ConstantScoreQuery(node)
            case query.NumericRange():
                return query.ConstantScoreQuery(node, node.boost)
        if node.fieldname != ANY:
            return _leaf(node, node.fieldname, node.boost)
        places = [_leaf(node, field, weight * node.boost) for field, weight in self._weights.items()]
        return query.Or(places) if len(places) > 1 else places[0]


def _leaf(leaf: query.Query, field: str, boost: float) -> query.Query:
    match leaf:
        case query.Term():
            return query.Term(field, leaf.text, boost=boost)
        case query.Phrase():
            return GappedPhrase(field, leaf.words, boost=boost)
        case query.Wildcard():
            return query.ConstantScoreQuery(query.Wildcard(written(field), leaf.text), boost)
        case _:
            low, high = leaf.startexcl, leaf.endexcl
            return query.ConstantScoreQuery(query.TermRange(written(field), leaf.start, leaf.end, low, high), boost)


def _scored(matcher: matching.Matcher) -> Iterator[tuple[int, float]]:
    while matcher.is_active():
        yield matcher.id(), matcher.score()
        matcher.next()
