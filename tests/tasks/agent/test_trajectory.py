"""A trajectory's row is a row of trajectories/2, and survives Parquet."""

from pathlib import Path

import pytest

from tasks import artifact, schemas
from tasks.agent.message import PLACEHOLDER, Image
from tasks.agent.trajectory import Question, SearchRecord, Trajectory, Turn, cited, to_row, tokens, turn_messages

IMAGE = Image(file="x.pdf", page=3, key="page-images/k.png", width=10, height=20)
FACTS = {"model": "m", "model_fingerprint": "mf", "index_fingerprint": "if", "code_fingerprint": "cf"}


def _trajectory() -> Trajectory:
    question = Question("q1", "What?", [["a", "b"]], [("x.pdf", 3)], "table", "train")
    search = SearchRecord("q", "q OR w", "query", [(1, "y.pdf", 1, 2.5), (2, "x.pdf", 3, 1.5)], 2, 0.5, True)
    turns = [
        Turn(1, "<search>q</search>", None, "search", [search], None, None, "parser", False, "stop", 10, 5, 0.1),
        Turn(2, "no", None, "none", [], "no_action", "why", None, False, "stop", None, None, 0.1),
    ]
    return Trajectory(
        question=question,
        protocol="tags",
        observation="text",
        top_k=2,
        sampling="greedy",
        seed=7,
        sampling_fingerprint="sf",
        prompt_fingerprint="pf",
        tools=None,
        turns=turns,
        answer=("42",),
        citations=[("x.pdf", 3), ("z.pdf", 1)],
        messages=[{"role": "user", "content": f"What? {PLACEHOLDER}", "images": [IMAGE]}],
    )


def test_row_is_of_the_declared_schema_and_survives_parquet(tmp_path: Path) -> None:
    row = to_row(_trajectory(), rollout_id="r1", attempt=2, sample=0, **FACTS)
    assert set(row) == set(schemas.TABLES["trajectories/2"].names)
    table = artifact.table_of([row], "trajectories/2")
    stored = artifact.write_table(table, str(tmp_path / "t.parquet"), "trajectories/2", {})
    (read,) = artifact.read_rows(stored)
    assert read == row
    assert (read["prompt_tokens"], read["completion_tokens"]) == (None, None)  # its second turn tells none
    assert read["citations"] == [
        {"file": "x.pdf", "page": 3, "seen": True},
        {"file": "z.pdf", "page": 1, "seen": False},
    ]
    assert read["turns"][0]["searches"][0]["results"][1] == {"rank": 2, "file": "x.pdf", "page_number": 3, "score": 1.5}


@pytest.mark.parametrize(("of_turns", "total"), [([], 0), ([3, 4], 7), ([3, None], None), ([0], 0)])
def test_tokens_that_a_server_does_not_tell_are_not_none_spent(of_turns: list[int | None], total: int | None) -> None:
    assert tokens(of_turns) == total


def test_whether_a_page_was_seen_is_not_known_behind_a_stored_conversation() -> None:
    search = {"results": [{"file": "a.pdf", "page_number": 1}], "shown": True}
    pages = [("a.pdf", 1), ("b.pdf", 2)]
    assert [c["seen"] for c in cited(pages, [{"searches": [search]}], 0)] == [True, False]
    assert [c["seen"] for c in cited(pages, [{"searches": [{**search, "shown": False}]}], 0)] == [False, False]
    assert [c["seen"] for c in cited(pages, [{"searches": [search]}], 2)] == [None, None]


def test_question_from_row_and_back() -> None:
    question = _trajectory().question
    row = to_row(_trajectory(), rollout_id="r", attempt=1, sample=0, **FACTS)
    assert Question.from_row(row) == question
    empty = {**row, "answers": None, "answer_locations": None, "category": None}
    assert Question.from_row(empty).answer_locations == []


@pytest.mark.parametrize(("turns", "messages"), [(0, []), (1, [4]), (2, [2, 4]), (9, [2, 4])])
def test_the_messages_of_turns_are_the_assistants_last_ones(turns: int, messages: list[int]) -> None:
    roles = ["system", "user", "assistant", "user", "assistant", "tool"]
    assert turn_messages(roles, turns) == messages
