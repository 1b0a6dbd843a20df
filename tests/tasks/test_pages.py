"""Pages can be looked up by file and page number, and nothing else can."""

import pytest

from tasks import artifact, storage
from tasks.artifact import Artifact
from tasks.errors import ArtifactError
from tasks.pages import PageStore


def stored(root: str, *places: tuple[str, int], source: str | None = None) -> Artifact:
    rows = [{"file": f, "page_number": n, "text": f"{f} {n} été", "source_uri": source} for f, n in places]
    return artifact.write_table(artifact.table_of(rows, "pages/2"), storage.join(root, "pages.parquet"), "pages/2", {})


def test_pages_are_found(storage_root: str) -> None:
    store = PageStore(stored(storage_root, ("b", 2), ("a", 1), ("b", 7), source="s3://x/b"))
    assert store.files() == ["b", "a"]
    assert store.text("b", 7) == "b 7 été"
    assert store.text("a", 1) == "a 1 été"
    assert store.source("b") == "s3://x/b"
    assert [place in store for place in (("b", 2), ("b", 1), ("c", 1))] == [True, False, False]
    assert [store.has_file(file) for file in ("a", "c")] == [True, False]


def test_ocr_pages_have_no_source(storage_root: str) -> None:
    assert PageStore(stored(storage_root, ("a", 1))).source("a") is None


def test_what_is_not_there_is_named(storage_root: str) -> None:
    store = PageStore(stored(storage_root, ("a", 1)))
    with pytest.raises(ArtifactError, match="no page 2 of 'a'"):
        store.text("a", 2)
    with pytest.raises(ArtifactError, match="no document 'b'"):
        store.source("b")


def test_only_pages_are_taken(storage_root: str) -> None:
    table = artifact.table_of([], "questions/1")
    questions = artifact.write_table(table, storage.join(storage_root, "q.parquet"), "questions/1", {})
    with pytest.raises(ArtifactError, match="run ingest"):
        PageStore(questions)


def test_many_pages_in_parts(tmp_path: object) -> None:
    tables = (
        artifact.table_of(
            [{"file": f"{part}", "page_number": n, "text": f"{part}/{n}"} for n in range(1, 101)], "pages/2"
        )
        for part in range(20)
    )
    store = PageStore(artifact.write_tables(tables, f"{tmp_path}/pages.parquet", "pages/2", {}))
    assert all(store.text(f"{part}", n) == f"{part}/{n}" for part in range(20) for n in (1, 50, 100))
