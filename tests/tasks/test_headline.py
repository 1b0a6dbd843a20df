"""What the report opens with claims no more of the questions than is known of what adapters learned from."""

from pathlib import Path
from typing import Any

import pytest

from tasks.artifact import Artifact, provenance, read_provenance, read_rows, table_of, write_table
from tasks.compare import compare
from tasks.report import write_report
from tests.tasks.test_report import Page, results

ELSEWHERE = {"questions": ["q900"], "documents": ["d900.pdf"], "known": True}
SOME = {"questions": ["q001", "q900"], "documents": ["d1.pdf", "d2.pdf", "d900.pdf"], "known": True}
OVERLAP = "adapter learned from 1 of them, and from questions about the documents of 2"


def _measured(folder: Path, run: str, learned: dict[str, Any] | None) -> Artifact:
    """Four questions, each about a document of its own, as an adapter did on them that had learned so much."""
    rows = read_rows(results(folder, run, [1, 2, None, 1]))
    facts = provenance(rollouts={"inputs": {"adapter": "its hash"}, "learned": learned})
    return write_table(table_of(rows, "results/4"), f"{folder}/{run} of an adapter.parquet", "results/4", facts)


def _report(folder: Path, *runs: Artifact) -> tuple[str, list[str]]:
    comparison = compare(runs, 100, f"{folder}/comparison.parquet")
    written = write_report(runs, comparison, uri=f"{folder}/report", facts={})
    text = Page((Path(written.uri) / "index.html").read_text(encoding="utf-8")).text
    return text, read_provenance(written)["conclusion"]


@pytest.mark.parametrize(
    ("learned", "said"),
    [
        (ELSEWHERE, "of 4 questions about unseen documents; before"),
        (SOME, f"of 4 questions ({OVERLAP}); before"),
        (SOME | {"known": False}, f"of 4 questions ({OVERLAP}); before"),
        ({"questions": [], "documents": [], "known": False}, "of 4 questions; before"),
        (None, "of 4 questions; before"),
    ],
    ids=["none of them", "some", "at least some", "imported", "earlier version"],
)
def test_questions_are_called_new_where_nothing_was_learned_about_their_documents(
    tmp_path: Path, learned: dict[str, Any] | None, said: str
) -> None:
    before = _measured(tmp_path, "before", ELSEWHERE)
    text, conclusion = _report(tmp_path, before, _measured(tmp_path, "adapter", learned))
    assert said in text
    assert (f"of 4 questions, {OVERLAP}" in conclusion) == (OVERLAP in said)


def test_of_a_model_as_it_is_nothing_is_said_of_what_it_learned(tmp_path: Path) -> None:
    text, _ = _report(tmp_path, *(results(tmp_path, run, [1, None]) for run in ("question", "base")))
    assert "of 2 questions; question, as typed" in text
