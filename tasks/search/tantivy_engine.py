"""tantivy answers the reduced tree (tasks/search/query.py) as tantivy query objects: hundreds of microseconds a query.

Scores are tantivy's BM25: k1 = 1.2, b = 0.75, idf = ln(1 + (N - n + 0.5) / (n + 0.5)). Patterns, ranges, page numbers and *:*
score their boost, which tantivy must be told: it leaves out of a sum what happens to match every page of a segment. A page is
known by its ordinal: its place among all pages in order of (file, page number).
"""

import fnmatch
import functools
import heapq
import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import tantivy
from tantivy import Occur, Query
from whoosh import query

from tasks.search import analysis
from tasks.search.analysis import FIELDS, written
from tasks.search.query import ANY, PAGE

blocking = False
_ORDINAL = "ordinal"
_HEAP = 256 * 1024 * 1024  # bytes that all indexing threads share before they write a segment
_DECIMALS = 4  # of a score; what is closer is a tie, so that rounding noise, which differs by segment, orders nothing

Clauses = list[tuple[Occur, Query]]


@functools.cache
def _schema() -> tantivy.Schema:
    builder = tantivy.SchemaBuilder()
    for field in FIELDS:
        builder.add_text_field(field, tokenizer_name="stems", index_option="position")
        builder.add_text_field(written(field), tokenizer_name="written", index_option="basic")
    builder.add_integer_field(PAGE, fast=True)
    builder.add_integer_field(_ORDINAL, fast=True)
    return builder.build()


def _with_analyzers(index: tantivy.Index) -> tantivy.Index:
    index.register_tokenizer("stems", analysis.analyzer("stems"))
    index.register_tokenizer("written", analysis.analyzer("written"))
    return index


def build(pages: Iterator[pa.Table], folder: Path) -> None:
    """Index pages, which come in order of their ordinals, into an empty folder."""
    writer = _with_analyzers(tantivy.Index(_schema(), str(folder))).writer(_HEAP)
    ordinal = 0
    for table in pages:
        for *texts, number in zip(*(table[name].to_pylist() for name in (*FIELDS, PAGE)), strict=True):
            document = {PAGE: number, _ORDINAL: ordinal}
            for field, text in zip(FIELDS, texts, strict=True):
                document[field] = document[written(field)] = text or ""
            writer.add_document(tantivy.Document(**document))
            ordinal += 1
    writer.commit()
    writer.wait_merging_threads()


class Engine:
    """An open index. `weights` are the fields that a word with no field is looked for in. Safe to share between threads."""

    def __init__(self, folder: Path, weights: dict[str, float]) -> None:
        self._searcher = _with_analyzers(tantivy.Index.open(str(folder))).searcher()
        self._weights = weights
        # looking a word up here is a hundred times faster than having tantivy search a field that does not hold it
        self._known = {field: frozenset(self._vocabulary(field, "")) for field in weights if field != "text"}

    def find(self, tree: query.Query, top_k: int) -> list[tuple[int, float]]:
        """Ordinals and scores of the best pages, best first, ties in order of their ordinals."""
        found, pages = self._query(tree), self._searcher.num_docs
        # pages that tie with the last one may lie beyond a limit, and segments are in no order
        for limit in (top_k, top_k + 16, top_k + 256, pages):
            scored = self._searcher.search(found, limit + 1, count=False).hits
            # a score that many pages have is rounded once
            rounded = {score: -round(score, _DECIMALS) for score in {score for score, _ in scored}}
            scores = [rounded[score] for score, _ in scored]
            if len(scores) <= limit or scores[top_k - 1] < scores[limit]:
                break
        ordinals = self._searcher.fast_field_values(_ORDINAL, [address for _, address in scored])
        ranked = heapq.nsmallest(top_k, zip(scores, ordinals, strict=True))
        return [(ordinal, -score) for score, ordinal in ranked]

    def _query(self, node: query.Query) -> Query:
        clauses = self._clauses(node)
        return clauses[0][1] if len(clauses) == 1 else Query.boolean_query(clauses)

    def _clauses(self, node: query.Query) -> Clauses:
        """A node as alternatives: a page matches when it matches one, and scores the sum of those that it matches."""
        match node:
            case query.Term():
                return self._term(node)
            case query.Or():
                return [clause for sub in node.subqueries for clause in self._clauses(sub)]
            case query.And():
                return _should(Query.boolean_query([(Occur.Must, self._query(sub)) for sub in node.subqueries]))
            case query.AndNot():
                return _should(_both(self._query(node.a), Occur.MustNot, self._query(node.b)))
            case query.AndMaybe():
                return _should(_both(self._query(node.a), Occur.Should, self._query(node.b)))
            case query.Require():
                required = Query.const_score_query(self._query(node.b), 0.0)
                return _should(_both(self._query(node.a), Occur.Must, required))
            case query.Every():
                return _should(Query.const_score_query(Query.all_query(), 1.0))
            case query.NumericRange():
                return _should(Query.const_score_query(_pages(node.start, node.end), node.boost))
            case _:
                places = self._fields(node)
                return [(Occur.Should, self._leaf(node, field, weight * node.boost)) for field, weight in places]

    def _term(self, node: query.Term) -> Clauses:
        clauses = []
        for field, weight in self._fields(node):
            if field not in self._known or node.text in self._known[field]:
                term = Query.term_query(_schema(), field, node.text, "freq")
                clauses.append((Occur.Should, _boosted(term, weight * node.boost)))
        return clauses

    def _fields(self, leaf: query.Query) -> Iterable[tuple[str, float]]:
        return self._weights.items() if leaf.fieldname == ANY else ((leaf.fieldname, 1.0),)

    def _leaf(self, leaf: query.Query, field: str, boost: float) -> Query:
        match leaf:
            case query.Phrase():
                words = [(place, stem) for place, stem in enumerate(leaf.words) if stem is not None]
                return _boosted(Query.phrase_query(_schema(), field, words), boost)
            case query.Wildcard():
                return Query.const_score_query(self._pattern(written(field), leaf.text), boost)
            case _:
                return Query.const_score_query(self._between(written(field), leaf), boost)

    def _pattern(self, field: str, pattern: str) -> Query:
        try:
            return Query.regex_query(_schema(), field, pattern.replace("*", ".*").replace("?", "."))
        except ValueError:  # its automaton would be too large; compare it with every word instead
            matches = re.compile(fnmatch.translate(pattern)).match
            return self._one_of(field, (word for word in self._vocabulary(field, "") if matches(word)))

    def _between(self, field: str, leaf: query.TermRange) -> Query:
        low, high = leaf.start or "", leaf.end
        words = self._vocabulary(field, _common_start(low, high or ""))
        if leaf.startexcl and low:
            words = (word for word in words if word != low)
        inside = (word for word in words if word >= low and (not high or word <= high))
        return self._one_of(field, (word for word in inside if not (leaf.endexcl and word == high)))

    def _vocabulary(self, field: str, prefix: str) -> Iterator[str]:
        return (word for word, _ in self._searcher.terms_with_prefix(field, prefix))

    def _one_of(self, field: str, words: Iterator[str]) -> Query:
        return Query.term_set_query(_schema(), field, list(words))


def _should(answer: Query) -> Clauses:
    return [(Occur.Should, answer)]


def _both(first: Query, how: Occur, second: Query) -> Query:
    return Query.boolean_query([(Occur.Must, first), (how, second)])


def _boosted(answer: Query, boost: float) -> Query:
    return answer if boost == 1.0 else Query.boost_query(answer, boost)


def _pages(low: int, high: int) -> Query:
    return Query.range_query(_schema(), PAGE, tantivy.FieldType.Integer, low, high)


def _common_start(one: str, other: str) -> str:
    return "".join(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
