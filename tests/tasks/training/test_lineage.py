"""What an adapter has learned from, over all of its trainings, and about which documents."""

from pathlib import Path
from typing import Any

import pytest

from tasks.artifact import Artifact, table_of, write_folder, write_table
from tasks.training.lineage import learned_about, learned_questions


def _adapter(folder: Path, facts: dict[str, Any]) -> Artifact:
    (folder / "files").mkdir(parents=True)
    return write_folder(folder / "files", str(folder / "stored"), "adapter/1", 1, facts)


def _questions(folder: Path, **documents: list[str]) -> Artifact:
    rows = [
        {
            "question_id": name,
            "answer_locations": [{"document": document, "page": 1} for document in places],
            "split": "test",
        }
        for name, places in documents.items()
    ]
    return write_table(table_of(rows, "questions/1"), str(folder / "questions.parquet"), "questions/1", {})


def test_an_adapter_has_learned_what_the_one_had_that_it_went_on_from(tmp_path: Path) -> None:
    assert learned_questions(["q2", "q1", "q2"], None, tmp_path) == ["q1", "q2"]
    start = _adapter(tmp_path / "start", {"learned_questions": ["q1", "q0"]})
    assert learned_questions({"q2", "q1"}, start, tmp_path) == ["q0", "q1", "q2"]


def test_what_it_learned_is_not_known_behind_an_imported_adapter_or_a_merged_one(tmp_path: Path) -> None:
    imported = _adapter(tmp_path / "imported", {"trained": {"learned_questions": ["q1"]}})
    assert learned_questions(["q2"], imported, tmp_path) is None
    unknown = _adapter(tmp_path / "unknown", {"learned_questions": None})
    assert learned_questions(["q2"], unknown, tmp_path) is None
    merged = write_folder(tmp_path / "imported" / "files", str(tmp_path / "merged"), "model/1", 1, {})
    assert learned_questions(["q2"], None, Path(merged.uri)) is None


@pytest.mark.parametrize(
    ("learned", "documents", "known"),
    [
        (["q1", "q2"], ["a.pdf", "b.pdf"], True),
        (["q1", "gone"], ["a.pdf"], False),
        ([], [], True),
        (None, [], False),
    ],
)
def test_documents_are_those_that_learned_questions_are_about(
    tmp_path: Path, learned: list[str] | None, documents: list[str], known: bool
) -> None:
    questions = _questions(tmp_path, q1=["a.pdf"], q2=["b.pdf", "a.pdf"], q3=["c.pdf"])
    found = learned_about(_adapter(tmp_path / "adapter", {"learned_questions": learned}), questions)
    assert found == {"questions": sorted(learned or []), "documents": documents, "known": known}
