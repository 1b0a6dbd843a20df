"""What search costs over bare tantivy: questions answered a second, and the time to build an index.

    python -m tests.bench.bench_search [--quick]

Needs nothing but the project: 10,000 pages of about 450 words are made up (word frequencies after Zipf's law, as in any
language), and questions of words that stand together on a page, none asked twice. About a minute on two cores; --quick, with
2,000 pages, a quarter of that.

The first number: `Searcher.search` reads the question, searches the OR of its words in text, file name and title with their
boosts, and gives file and page of ten hits. The peer is a tantivy searcher over an index of the same fields that gets the
same query as an object that was made beforehand, and looks up file and page in its document store.

The second: `build_index`, from Parquet to stored artifact, against tantivy indexing the same fields from the same Parquet.
"""

import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow.parquet as pq
import tantivy
from tantivy import Occur, Query

from tasks import artifact, config
from tasks.artifact import Artifact
from tasks.search import analysis
from tasks.search.index import Searcher, build_index, open_index
from tests.bench import harness

WORDS_A_PAGE, WORDS_A_QUESTION, VOCABULARY = 450, 12, 60_000
TOP_K = 10
SEARCH = config.Search()
T = TypeVar("T")
WEIGHTS = {"text": 1.0, "file": SEARCH.file_boost, "title": SEARCH.title_boost}


def run(quick: bool = False) -> list[harness.Row]:
    """Measure; one row a number.

    Each number is the median of rounds in which ours and the peer take turns, so that both meet the same machine.
    """
    n_pages, rounds, n_questions = (2_000, 3, 300) if quick else (10_000, 7, 1_000)
    with tempfile.TemporaryDirectory() as root:
        pages, questions = _collection(n_pages, rounds * n_questions, Path(root))
        built: list[float] = []
        peer_built: list[float] = []
        for turn in range(5):
            index, seconds = _timed(lambda n=turn: build_index(pages, config.Index(), f"{root}/index{n}"))
            built.append(seconds)
            peer, seconds = _timed(lambda n=turn: _peer_index(pages.uri, Path(root) / f"peer{n}"))
            peer_built.append(seconds)
        searcher, peer_searcher = open_index(index, SEARCH), peer.searcher()
        searched: list[float] = []
        peer_searched: list[float] = []
        for turn in range(rounds):
            asked = questions[turn * n_questions : (turn + 1) * n_questions]
            mine, its = _time_searches(searcher, peer_searcher, [(q, _peer_query(peer, q)) for q in asked])
            searched.append(n_questions / mine)
            peer_searched.append(n_questions / its)
    first, second = f"search, {n_pages} pages, OR of a question's words", f"index build, {n_pages} pages"
    return [
        harness.row(first, statistics.median(searched), statistics.median(peer_searched), "≥ 0.8", "questions/s"),
        harness.row(second, statistics.median(built), statistics.median(peer_built), "≤ 1.3", "s"),
    ]


def _time_searches(ours: Searcher, peer: tantivy.Searcher, asked: list[tuple[str, Query]]) -> tuple[float, float]:
    """Seconds that ours and the peer take for the same questions, each question by one and then by the other."""
    mine = its = 0.0
    for question, query in asked:
        result, seconds = _timed(lambda q=question: ours.search(q, TOP_K))
        mine += seconds
        hits, seconds = _timed(lambda q=query: _peer_search(peer, q))
        its += seconds
        if (
            len(result.hits) != len(hits) or abs(result.hits[-1].score - hits[-1][0]) > 1e-3
        ):  # nobody wins by finding less
            raise RuntimeError(f"ours and the peer do not find the same for {question!r}")
    return mine, its


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def _collection(n_pages: int, n_questions: int, folder: Path) -> tuple[Artifact, list[str]]:
    """Pages in documents of 25, and questions, the same every time."""
    draw = random.Random(0)
    words = np.array(
        ["".join(draw.choices("abcdefghijklmnoprstuvw", k=draw.randint(3, 11))) for _ in range(VOCABULARY)]
    )
    words[: len(analysis.STOP_WORDS)] = analysis.STOP_WORDS  # as in English, they are the most frequent
    often = 1 / (np.arange(VOCABULARY) + 2.7)
    chance = np.random.default_rng(0)
    lengths = np.clip(chance.lognormal(np.log(WORDS_A_PAGE), 0.5, n_pages), 2 * WORDS_A_QUESTION, 4_000).astype(int)
    texts = [words[chance.choice(VOCABULARY, length, p=often / often.sum())] for length in lengths]
    rows = [
        {
            "file": f"{words[500 + number // 25]}_{words[9000 + number // 25]}.pdf",
            "page_number": number % 25 + 1,
            "total_pages": 25,
            "title": " ".join(words[2000 + number // 25 * 3 :][:3]),
            "text": " ".join(text),
        }
        for number, text in enumerate(texts)
    ]
    pages = artifact.write_table(artifact.table_of(rows, "pages/2"), str(folder / "pages.parquet"), "pages/2", {})
    questions = []
    for text in draw.choices(texts, k=n_questions):
        at = draw.randrange(len(text) - WORDS_A_QUESTION)
        questions.append(f"What is {' '.join(text[at : at + WORDS_A_QUESTION])}?")
    return pages, questions


def _peer_index(uri: str, folder: Path) -> tantivy.Index:
    builder = tantivy.SchemaBuilder()
    for field in WEIGHTS:
        builder.add_text_field(field, tokenizer_name="stems")
        builder.add_text_field(f"{field}_written", tokenizer_name="written", index_option="basic")
    builder.add_text_field("stored_file", stored=True, tokenizer_name="raw")
    builder.add_integer_field("page_number", stored=True, fast=True)
    folder.mkdir()
    index = tantivy.Index(builder.build(), str(folder))
    index.register_tokenizer("stems", analysis.analyzer("stems"))
    index.register_tokenizer("written", analysis.analyzer("written"))
    writer = index.writer()
    for batch in pq.ParquetFile(uri).iter_batches(columns=["file", "page_number", "title", "text"]):
        for row in batch.to_pylist():
            fields = {name: row[name] for name in WEIGHTS}
            written = {f"{name}_written": row[name] for name in WEIGHTS}
            writer.add_document(
                tantivy.Document(**fields, **written, stored_file=row["file"], page_number=row["page_number"])
            )
    writer.commit()
    writer.wait_merging_threads()
    index.reload()
    return index


def _peer_query(index: tantivy.Index, question: str) -> Query:
    terms = [
        Query.boost_query(Query.term_query(index.schema, field, stem, "freq"), weight)
        for stem in dict.fromkeys(analysis.stems(question))
        for field, weight in WEIGHTS.items()
    ]
    return Query.boolean_query([(Occur.Should, term) for term in terms])


def _peer_search(searcher: tantivy.Searcher, query: Query) -> list[tuple[float, str, int]]:
    found = []
    for score, address in searcher.search(query, TOP_K, count=False).hits:
        document = searcher.doc(address)
        found.append((score, document.get_first("stored_file"), document.get_first("page_number")))
    return found


if __name__ == "__main__":
    harness.main(__doc__, run)
