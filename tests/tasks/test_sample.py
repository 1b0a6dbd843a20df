"""The sample collection: sound, the same each time, and hard in the way it is meant to be."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pymupdf
import pytest
import tantivy

from flows.demo import demo
from tasks import config
from tasks.errors import ConfigError
from tasks.sample import Sample, family, render, write_sample
from tests.servers import ROOT

Pages = dict[tuple[str, int], str]
Row = dict[str, Any]

_WITHOUT_LIGATURES = pymupdf.TEXTFLAGS_TEXT & ~pymupdf.TEXT_PRESERVE_LIGATURES


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    return write_sample(tmp_path_factory.mktemp("sample"))


@pytest.fixture(scope="module")
def pages(sample: Sample) -> Pages:
    """Every page's text, white space normalised."""
    pages = {}
    for path in sorted(sample.documents.iterdir()):
        with pymupdf.open(path) as pdf:
            for number, page in enumerate(pdf, start=1):
                pages[path.name, number] = " ".join(page.get_text(flags=_WITHOUT_LIGATURES).split())
    return pages


@pytest.fixture(scope="module")
def questions(sample: Sample) -> list[Row]:
    return _read(sample.questions)


def _read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _locations(question: Row) -> list[tuple[str, int]]:
    return [(location["document"], location["page"]) for location in question["answer_locations"]]


def test_documents(sample: Sample, pages: Pages) -> None:
    assert 44 <= len(list(sample.documents.glob("*.pdf"))) <= 60
    assert 260 <= len(pages) <= 320
    assert min(len(text.split()) for text in pages.values()) > 150
    assert len(set(pages.values())) == len(pages)


def test_every_document_has_a_title_and_page_numbers(sample: Sample, pages: Pages) -> None:
    titles = set()
    for path in sample.documents.iterdir():
        with pymupdf.open(path) as pdf:
            titles.add(pdf.metadata["title"])
            assert pages[path.name, 2].endswith(f"Page 2 of {len(pdf)}")
    assert len(titles) == len(list(sample.documents.iterdir()))
    assert all(titles)


def test_questions(pages: Pages, questions: list[Row]) -> None:
    assert 560 <= len(questions) <= 700
    assert len(questions) >= 2 * len(pages)
    assert len({question["question"] for question in questions}) == len(questions)
    assert len({question["id"] for question in questions}) == len(questions)
    assert len({question["category"] for question in questions}) == 7
    assert not [question for question in questions if set("{}") & set(json.dumps(question["question"]))]
    asked = Counter(document for question in questions for document in {name for name, _ in _locations(question)})
    assert set(asked) == {document for document, _ in pages}
    assert min(asked.values()) >= 6


def test_answers_are_on_their_pages_of_one_document(pages: Pages, questions: list[Row]) -> None:
    for question in questions:
        locations = _locations(question)
        assert len({document for document, _ in locations}) == 1
        for location in locations:
            for answer in question["answers"]:
                assert all(" ".join(part.split()) in pages[location] for part in answer), question["id"]
    assert sum(len(_locations(question)) == 2 for question in questions) >= 5


def test_expert_queries_match_the_questions(sample: Sample, questions: list[Row]) -> None:
    queries = _read(sample.expert_queries)
    assert [query["id"] for query in queries] == [question["id"] for question in questions]
    assert all(2 <= len(query["query"].split()) <= 7 for query in queries)


def test_same_bytes_each_time(sample: Sample, tmp_path: Path) -> None:
    again = write_sample(tmp_path)
    first, second = (
        {path.relative_to(one.documents.parent): path.read_bytes() for path in one.documents.parent.rglob("*.*")}
        for one in (sample, again)
    )
    assert first == second


def test_vocabulary_is_what_stands_between_question_and_page(
    sample: Sample, pages: Pages, questions: list[Row]
) -> None:
    search = _bm25(sample, pages)
    expert = {row["id"]: row["query"] for row in _read(sample.expert_queries)}
    raw_hits = [search(question["question"]) in _locations(question) for question in questions]
    expert_hits = [search(expert[question["id"]]) in _locations(question) for question in questions]
    assert 0.35 <= sum(raw_hits) / len(questions) <= 0.55
    assert sum(expert_hits) / len(questions) > 0.9


def _bm25(sample: Sample, pages: Pages) -> Callable[[str], tuple[str, int]]:
    """A search for any of the words, with the words of file name and title in a field of their own; the best page."""
    analyzer = (
        tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.simple())
        .filter(tantivy.Filter.lowercase())
        .filter(tantivy.Filter.stopword("english"))
        .filter(tantivy.Filter.stemmer("english"))
        .build()
    )
    builder = tantivy.SchemaBuilder()
    for field in ("body", "name"):
        builder.add_text_field(field, tokenizer_name="words")
    builder.add_unsigned_field("key", stored=True)
    schema = builder.build()
    index = tantivy.Index(schema)
    index.register_tokenizer("words", analyzer)
    writer = index.writer(num_threads=1)
    titles = {}
    for path in sample.documents.iterdir():
        with pymupdf.open(path) as pdf:
            titles[path.name] = f"{path.stem} {pdf.metadata['title']}"
    keys = list(pages)
    for key, (file, number) in enumerate(keys):
        writer.add_document(tantivy.Document(body=pages[file, number], name=titles[file], key=key))
    writer.commit()
    index.reload()
    searcher = index.searcher()

    def search(words: str) -> tuple[str, int]:
        clauses = []
        for term in dict.fromkeys(analyzer.analyze(words)):
            in_name = tantivy.Query.term_query(schema, "name", term)
            clauses.append((tantivy.Occur.Should, tantivy.Query.term_query(schema, "body", term)))
            clauses.append((tantivy.Occur.Should, tantivy.Query.boost_query(in_name, 3.0)))
        hits = searcher.search(tantivy.Query.boolean_query(clauses), 1).hits
        return keys[searcher.doc(hits[0][1])["key"][0]]

    return search


@pytest.mark.parametrize("values", ["[a, b, c]", "[a, b, c, d, e]"])
def test_facts_that_do_not_fill_the_family_are_refused(tmp_path: Path, values: str) -> None:
    path = tmp_path / "family.yaml"
    path.write_text(f"facts: {{one: {values}, two: [x, y]}}\n", encoding="utf-8")
    with pytest.raises(ValueError, match="two"):
        family.read_family(path)


def test_text_that_does_not_fit_its_page_is_refused() -> None:
    page = family.Page("Long", "word " * 3000)
    document = family.Document("long.pdf", "Long", "Long", "manual", (page,), ())
    with pytest.raises(ValueError, match="does not fit"):
        render.to_pdf(document)


def test_files_of_ones_own_are_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "questions.jsonl").write_text("mine")
    with pytest.raises(ConfigError, match="not the sample's"):
        write_sample(tmp_path)
    assert (tmp_path / "questions.jsonl").read_text() == "mine"


def test_what_an_older_sample_left_is_gone(tmp_path: Path) -> None:
    older = write_sample(tmp_path).documents / "older.pdf"
    older.write_bytes(b"%PDF")
    assert not (write_sample(tmp_path).documents / older.name).exists()


def test_the_demo_refuses_documents_of_ones_own(tmp_path: Path) -> None:
    mine = config.Ingest(documents=str(tmp_path / "mine"), questions=str(tmp_path / "questions.jsonl"))
    with pytest.raises(ConfigError, match="drag improve"):
        demo(config.Improve(storage=str(tmp_path / "store"), ingest=mine))
    assert not list(tmp_path.iterdir())


def test_a_sample_whose_writing_was_broken_off_is_written_again(
    sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = 0

    def killed(document: Any) -> bytes:
        nonlocal written
        written += 1
        if written == 3:
            raise KeyboardInterrupt
        return render.to_pdf(document)

    with monkeypatch.context() as patch:
        patch.setattr("tasks.sample.to_pdf", killed)
        with pytest.raises(KeyboardInterrupt):
            write_sample(tmp_path)
    again = write_sample(tmp_path)
    assert again.questions.read_bytes() == sample.questions.read_bytes()
    assert {path.name for path in again.documents.iterdir()} == {path.name for path in sample.documents.iterdir()}


@pytest.mark.parametrize("flag", ["--help", "--folder"])
def test_a_flag_is_no_folder(flag: str, tmp_path: Path) -> None:
    command, env = [sys.executable, "-m", "tasks.sample", flag], os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == (flag == "--help")
    assert "usage: python -m tasks.sample" in done.stdout + done.stderr
    assert not list(tmp_path.iterdir())
