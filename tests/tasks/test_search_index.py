"""The index as an artifact, what a searcher promises, and that both engines answer every query with the same pages."""

import random
import threading
import uuid
from collections.abc import Awaitable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks import artifact, config, storage
from tasks.agent.rollout import search_with
from tasks.artifact import Artifact
from tasks.errors import ArtifactError
from tasks.search import ENGINES, analysis, tantivy_engine
from tasks.search.index import Searcher, SearchResult, build_index, open_index

Page = dict[str, object]


def page(text: str, file: str = "a.pdf", number: int = 1, title: str | None = None) -> Page:
    return {
        "file": file,
        "page_number": number,
        "total_pages": 1,
        "title": title,
        "text": text,
        "text_source": "pdf",
        "source_uri": None,
        "source_sha256": "",
    }


def write_pages(pages: list[Page], folder: Path) -> Artifact:
    table = artifact.table_of(pages, "pages/2")
    return artifact.write_table(table, str(folder / f"{uuid.uuid4().hex}.parquet"), "pages/2", {})


def searchers(pages: list[Page], folder: Path, search: config.Search) -> dict[str, Searcher]:
    table = write_pages(pages, folder)
    return {
        name: open_index(
            build_index(table, config.Index(engine=name), str(folder / f"index-{uuid.uuid4().hex}")), search
        )
        for name in ENGINES
    }


PAGES = [
    page("Net revenue rose in 2020, the state of the union.", "reports/annual_2020.pdf", 2, "Annual report"),
    page("Net revenue fell in 2021; women and a woman.", "reports/annual_2021.pdf", 1, "Annual report"),
    page("Nothing is said of money on this page.", "reports/annual_2020.pdf", 10, "Annual report"),
    page("Nothing is said of money on this page.", "minutes.pdf", 1),
    page("Nothing is said of money on this page.", "minutes.pdf", 2),
    page("", "empty.pdf", 1),
]


@pytest.fixture(params=list(ENGINES))
def index(request: pytest.FixtureRequest, tmp_path: Path) -> Artifact:
    return build_index(write_pages(PAGES, tmp_path), config.Index(engine=request.param), str(tmp_path / "index"))


def found(result: SearchResult) -> list[tuple[str, int]]:
    return [(hit.file, hit.page_number) for hit in result.hits]


def test_an_index_on_any_storage_is_searched(
    storage_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRAG_CACHE", str(tmp_path / "cache"))
    pages = artifact.write_table(
        artifact.table_of(PAGES, "pages/2"), storage.join(storage_root, "pages.parquet"), "pages/2", {}
    )
    for engine in ENGINES:
        index = build_index(pages, config.Index(engine=engine), storage.join(storage_root, engine))
        assert (index.schema, index.rows) == ("index/1", len(PAGES))
        assert artifact.read_provenance(index)["inputs"] == {"pages": pages.sha256}
        assert found(open_index(index, config.Search()).search("rose", 3)) == [("reports/annual_2020.pdf", 2)]
        again = build_index(pages, config.Index(engine=engine), storage.join(storage_root, engine))
        assert found(open_index(again, config.Search()).search("rose", 3)) == [("reports/annual_2020.pdf", 2)]


def test_ties_are_in_order_of_file_and_page(index: Artifact) -> None:
    searcher = open_index(index, config.Search(file_boost=0))
    everything = [("empty.pdf", 1), ("minutes.pdf", 1), ("minutes.pdf", 2), ("reports/annual_2020.pdf", 2)]
    assert found(searcher.search("*:*", 4)) == everything
    assert found(searcher.search("money", 2)) == [("minutes.pdf", 1), ("minutes.pdf", 2)]
    assert found(searcher.search("money", 9))[2:] == [("reports/annual_2020.pdf", 10)]


def test_file_and_title_words_count_with_their_boost(index: Artifact) -> None:
    assert found(open_index(index, config.Search()).search("2021", 1)) == [("reports/annual_2021.pdf", 1)]
    assert len(open_index(index, config.Search()).search("annual", 9).hits) == 3
    assert open_index(index, config.Search(file_boost=0, title_boost=0)).search("annual", 9).hits == ()
    assert len(open_index(index, config.Search(file_boost=0, title_boost=0)).search("title:annual", 9).hits) == 3
    low, high = (open_index(index, config.Search(title_boost=boost)).search("report", 1) for boost in (1, 6))
    assert high.hits[0].score > low.hits[0].score


@pytest.mark.parametrize(
    ("query", "pages"),
    [
        ("wom?n", [("reports/annual_2021.pdf", 1)]),
        ("revenue*", [("reports/annual_2020.pdf", 2), ("reports/annual_2021.pdf", 1)]),
        ('"net revenue" NOT 2021', [("reports/annual_2020.pdf", 2)]),
        ('"state of the union"', [("reports/annual_2020.pdf", 2)]),
        ('"state the union"', []),
        ('"state union"~3', [("reports/annual_2020.pdf", 2)]),
        ("file:annual_2020.pdf AND page_number:[5 TO 20]", [("reports/annual_2020.pdf", 10)]),
        ("[2021 TO 2022]", [("reports/annual_2021.pdf", 1)]),
        ("*a????????????*", []),  # an automaton of this pattern would be too large for tantivy
        ("*n????????????* OR rose", [("reports/annual_2020.pdf", 2)]),
        ("zebra", []),
        ("", []),
    ],
)
def test_what_is_found(index: Artifact, query: str, pages: list[tuple[str, int]]) -> None:
    assert sorted(found(open_index(index, config.Search()).search(query, 9))) == pages


def test_or_ranks_and_and_requires(index: Artifact) -> None:
    loose = open_index(index, config.Search(file_boost=0)).search("revenue rose zebra", 9)
    assert found(loose) == [("reports/annual_2020.pdf", 2), ("reports/annual_2021.pdf", 1)]
    strict = open_index(index, config.Search(operator="and", file_boost=0))
    assert strict.search("revenue rose zebra", 9).hits == ()
    assert found(strict.search("revenue rose", 9)) == [("reports/annual_2020.pdf", 2)]


def test_the_question_is_added_to_what_has_no_operators(index: Artifact) -> None:
    searcher = open_index(index, config.Search(expand="question"))
    result = searcher.search("money", 1, question="What (exactly) rose in 2020 AND why?")
    assert result.searched == "money What  exactly  rose in 2020 and why"
    assert result.read_as == "query"
    assert found(result) == [("reports/annual_2020.pdf", 2)]
    assert searcher.search('"money"', 1, question="What rose?").searched == '"money"'
    assert searcher.search("m?ney", 1, question="What rose?").searched == "m?ney"
    assert searcher.search("money?", 1, question="What rose?").searched == "money What rose"
    assert searcher.search("money_{o2o} (2019)", 1, question="What rose?").searched.split()[-2:] == ["What", "rose"]
    assert searcher.search("money", 1).searched == "money"
    assert open_index(index, config.Search()).search("money", 1, question="What rose?").searched == "money"
    strict = open_index(index, config.Search(expand="question", operator="and", file_boost=0))
    assert found(strict.search("revenue", 9, "What fell?"))[0] == ("reports/annual_2021.pdf", 1)
    assert len(strict.search("revenue", 9, "What fell?").hits) == 2
    assert found(strict.search("{}", 9, "What fell?"))[0] == ("reports/annual_2021.pdf", 1)
    # whatever its length, no more is demanded than its own words
    assert strict.search("revenue " * 400, 9, "What\ud800 fell?").hits == strict.search("revenue", 9, "What fell?").hits


def test_a_query_that_cannot_be_read_is_recorded(index: Artifact) -> None:
    result = open_index(index, config.Search()).search("NOT AND money", 9)
    assert (result.read_as, len(result.hits)) == ("words", 3)


def test_no_query_is_an_error(index: Artifact) -> None:
    searcher = open_index(index, config.Search())
    for query in [
        "\x00",
        "\ud800",
        "🎉 " * 50,
        "مرحبا بالعالم؟",
        "(" * 5000,
        '"' * 999,
        "*" * 500,
        "w " * 9000,
        "a^9e9",
        "-",
        "^0",
    ]:
        assert len(searcher.search(query, 3).hits) <= 3


def test_threads_share_a_searcher(index: Artifact) -> None:
    searcher = open_index(index, config.Search())
    queries = ["money", "revenue NOT 2021", "rev*", '"net revenue"', "annual OR minutes"] * 20
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda q: searcher.search(q, 5), queries)) == [searcher.search(q, 5) for q in queries]


def test_an_empty_collection_has_an_index(tmp_path: Path) -> None:
    pages = write_pages([], tmp_path)
    for engine in ENGINES:
        index = build_index(pages, config.Index(engine=engine), str(tmp_path / engine))
        for query in ["money", "*:*", "NOT money", '"a money"', "m*"]:
            assert open_index(index, config.Search()).search(query, 3).hits == ()


def test_what_is_no_index_is_refused(tmp_path: Path) -> None:
    pages = write_pages(PAGES, tmp_path)
    with pytest.raises(ArtifactError, match="run the stage"):
        open_index(pages, config.Search())
    with pytest.raises(ArtifactError, match="an index is made of"):
        build_index(Artifact(pages.uri, pages.sha256, pages.rows, "questions/1"), config.Index(), str(tmp_path / "i"))
    with pytest.raises(ArtifactError, match="does not exist"):
        open_index(Artifact(str(tmp_path / "gone"), "", 0, "index/1"), config.Search())


@pytest.mark.parametrize(
    "query", ["money", "What is said (of money)?", "*:*", "mon*", "page_number:[1 TO 5]", "[a TO w]"]
)
async def test_only_plain_words_are_searched_on_the_event_loops_thread(
    index: Artifact, query: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    searcher = open_index(index, config.Search())
    expected, find, threads = searcher.search(query, 3), searcher._engine.find, []

    def recorded(tree: Any, top_k: int) -> list[tuple[int, float]]:
        threads.append(threading.current_thread())
        return find(tree, top_k)

    monkeypatch.setattr(searcher._engine, "find", recorded)
    answer = search_with(searcher, 3)(query, "")
    result = await answer if isinstance(answer, Awaitable) else answer
    assert result == expected
    plain = query == "money" and isinstance(searcher._engine, tantivy_engine.Engine)
    assert [thread is threading.current_thread() for thread in threads] == [plain]


WORDS = [
    "revenue",
    "revenues",
    "Net",
    "nets",
    "covid-19",
    "19",
    "the",
    "of",
    "state",
    "union",
    "report_2020",
    "2020",
    "année",
]
WORDS += [
    "東京",
    "ΣΑΣ",
    "İx",
    "a",
    "aab",
    "abab",
    "x" * 64,
    "x" * 65,
    "naïve",
    "don't",
    "\x00",
    "मुंबई",
    "2021",
    "tax",
    "taxes",
]
word = st.sampled_from(WORDS)
text = st.lists(word, max_size=12).map(" ".join)
leaf = st.one_of(
    word,
    st.lists(word, min_size=1, max_size=4).map(lambda words: f'"{" ".join(words)}"'),
    st.tuples(st.lists(word, min_size=2, max_size=3), st.integers(1, 4)).map(lambda p: f'"{" ".join(p[0])}"~{p[1]}'),
    st.text("ab*?e0 2n", min_size=1, max_size=6).map(lambda t: t + "*"),
    st.tuples(word, word).map(lambda pair: f"[{pair[0]} TO {pair[1]}]"),
    st.tuples(word, word).map(lambda pair: f"{{{pair[0]} TO {pair[1]}}}"),
    st.sampled_from(["*:*", "rev*", "*e*", "n?t", "[2020 TO]", "[TO m}", "page_number:2", "page_number:[1 TO 2]", "*"]),
)
fielded = st.tuples(
    st.sampled_from(["", "", "", "text:", "file:", "title:"]), leaf, st.sampled_from(["", "", "^2", "^0"])
).map("".join)
expression = st.recursive(
    fielded,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["AND", "OR", "NOT", "ANDNOT", "ANDMAYBE", "REQUIRE", ""]), inner).map(
            " ".join
        ),
        inner.map("NOT {}".format),
        st.tuples(inner, inner, st.sampled_from(["", "^3"])).map(lambda p: f"({p[0]} {p[1]}){p[2]}"),
        st.tuples(st.sampled_from(["text", "file", "title"]), inner).map(lambda p: f"{p[0]}:({p[1]})"),
    ),
    max_leaves=8,
)
collection = st.lists(st.tuples(text, st.lists(word, max_size=3), st.none() | text), min_size=1, max_size=12).map(
    lambda rows: [
        page(body, "/".join(name) + ".pdf", number, title) for number, (body, name, title) in enumerate(rows, 1)
    ]
)
weights = st.sampled_from([0.0, 1.0, 3.0])


def assert_alike(both: dict[str, Searcher], query: str, top_k: int) -> int:
    """Both engines find the same pages for a query, with scores that are nearly the same; returns how many."""
    found = {name: searcher.search(query, top_k).hits for name, searcher in both.items()}
    scores = {(hit.file, hit.page_number): hit.score for hit in found["whoosh"]}
    assert {(hit.file, hit.page_number) for hit in found["tantivy"]} == scores.keys(), query
    # each engine rounds the length of a page in its own way
    near = pytest.approx([scores[hit.file, hit.page_number] for hit in found["tantivy"]], rel=0.15, abs=1e-3)
    assert [hit.score for hit in found["tantivy"]] == near, query
    for hits in found.values():
        assert [hit.rank for hit in hits] == list(range(1, len(hits) + 1))
        order = [(-hit.score, hit.file, hit.page_number) for hit in hits]
        assert order == sorted(order), query
    return len(scores)


@settings(max_examples=15, deadline=None)
@given(
    collection,
    st.lists(expression | st.text(max_size=20), min_size=15, max_size=40),
    st.builds(config.Search, operator=st.sampled_from(["or", "and"]), file_boost=weights, title_boost=weights),
)
def test_engines_match_the_same_pages_with_like_scores(
    tmp_path_factory: pytest.TempPathFactory, pages: list[Page], queries: list[str], search: config.Search
) -> None:
    both = searchers(pages, tmp_path_factory.mktemp("pages"), search)
    for query in queries:
        assert_alike(both, query, len(pages))


def test_engines_match_the_same_pages_of_many(tmp_path: Path) -> None:
    """More pages than the blocks that either engine works in."""
    draw = random.Random(7)
    names = [f"w{rank}" for rank in range(300)]
    often = [1 / (rank + 1) for rank in range(300)]
    texts = [" ".join(draw.choices(names, often, k=draw.randint(1, 12))) for _ in range(2_500)]
    pages = [page(body, f"{number % 50}.pdf", number, f"T{number % 7}") for number, body in enumerate(texts, 1)]
    both = searchers(pages, tmp_path, config.Search())
    queries = [
        "w0 w1 w2",
        "w0 NOT w1",
        "NOT w0",
        "w5 AND (w1 OR w2) NOT w3",
        '"w0 w1" OR "w1 w0"~3',
        "w1* NOT w1",
        "*:*",
    ]
    queries += ["title:t3 AND w200", "page_number:[100 TO 2400] REQUIRE w0", "w9 ANDMAYBE w0", "NOT (w0 OR NOT w1) w2"]
    assert all(assert_alike(both, query, len(pages)) for query in queries)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=80) | text)
def test_stems_and_written_words_stand_at_the_same_places(body: str) -> None:
    body = body.encode("utf-8", "ignore").decode()
    stems, written = analysis.placed(body, "stems"), analysis.placed(body, "written")
    assert [place for _, place in stems] == [place for _, place in written]
    assert [stem for stem, _ in stems] == analysis.stems(body)


def test_a_title_that_is_the_file_name_counts_once(tmp_path: Path) -> None:
    pages = [page("words", "pump.pdf", title="pump"), page("words", "valve.pdf", title="Pump and valve")]
    for searcher in searchers(pages, tmp_path, config.Search()).values():
        assert found(searcher.search("title:pump", 9)) == [("valve.pdf", 1)]
        assert found(searcher.search("file:pump", 9)) == [("pump.pdf", 1)]
