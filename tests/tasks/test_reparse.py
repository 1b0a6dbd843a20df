"""Reading stored rollouts again: the same parser changes nothing, another one changes what it reads and no more."""

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tasks import artifact, config
from tasks.agent import protocol_tools
from tasks.agent.calls import Block, read_calls
from tasks.agent.client import open_client
from tasks.agent.rollout import rollout, search_with
from tasks.agent.sampling import resolve
from tasks.agent.trajectory import Question, to_row
from tasks.artifact import Artifact
from tasks.errors import ArtifactError
from tasks.reparse import markdown, read_changes, reparse
from tasks.search.index import build_index, open_index
from tasks.statistics import turns_markdown
from tests.model_server import ModelServer, Reply

PAGES = {("pump.pdf", 1): "Safety of the Orion pump.", ("pump.pdf", 2): "The pump stays below 85 degrees."}
QUESTION = Question("q1", "How hot may the pump get?", [["85 °C"]], [("pump.pdf", 2)], "text", "train")
BROKEN = '<tool_call>\n{"name": "search_documents", "arguments": {"query": "pump degrees"}\n</tool_call>'
BROKEN_ANSWER = (
    '<tool_call>\n{"name": "provide_answer", "arguments": {"answer": ["85", ], "citations": []}}\n</tool_call>'
)
SEARCH = ("search_documents", json.dumps({"query": "pump degrees"}))
CITES = [{"file": "pump.pdf", "page": 2}, {"file": "pump.pdf", "page": 9}]
ANSWER = ("provide_answer", json.dumps({"answer": ["85", "86"], "citations": CITES}))
CONVERSATIONS: dict[str, list[list[Reply]]] = {
    "tools": [
        [Reply(None, "why", [SEARCH]), Reply(None, None, [ANSWER])],
        [
            Reply(None, None, [SEARCH, ("fly", "{}"), SEARCH]),
            Reply("I think."),
            Reply(BROKEN),
            Reply(None, None, [ANSWER]),
        ],
        [Reply(None, None, [("search_documents", '{"query": "a"')]), Reply(None, None, [SEARCH]), Reply(BROKEN)],
        [Reply(f"<think>x {BROKEN}"), Reply("", f"thought {BROKEN}"), Reply(BROKEN_ANSWER)],
        [Reply(BROKEN[:-20], finish_reason="length"), Reply("<tool_call>{{"), Reply(None, None, [SEARCH, ANSWER])],
        [Reply('{"name": "search_documents", "arguments": {"query": "\\ud800 x"}}'), Reply(BROKEN_ANSWER), Reply("")],
    ],
    "tags": [
        [
            Reply("<think>why</think>\n<search>pump degrees</search>"),
            Reply('<answer>a\nb <cite file="pump.pdf" page="2"/></answer>'),
        ],
        [Reply("<search>pump", "why"), Reply("no"), Reply("<search></search>"), Reply("<search>x</search>")],
        [Reply("<search>pump", finish_reason="length"), Reply("<answer></answer>"), Reply("<answer>42")],
    ],
}


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return small_index(tmp_path_factory.mktemp("index"))


def small_index(folder: Path) -> Artifact:
    rows = [
        {"file": f, "page_number": p, "total_pages": 2, "text": text, "text_source": "pdf"}
        for (f, p), text in PAGES.items()
    ]
    pages = artifact.write_table(artifact.table_of(rows, "pages/2"), f"{folder}/pages.parquet", "pages/2", {})
    return build_index(pages, config.Index(), str(folder / "index"))


def collected(index: Artifact, uri: str, protocol: str, conversations: list[list[Reply]], **agent: Any) -> Artifact:
    """Real rollouts against a server that says these things, stored as `collect` stores them."""
    settings = config.Agent(protocol=protocol, **agent)
    searching = search_with(open_index(index, config.Search()), settings.top_k)
    facts = {"model": "m", "model_fingerprint": "m", "index_fingerprint": index.sha256, "code_fingerprint": "c"}

    async def run(replies: list[Reply], number: int) -> dict[str, Any]:
        with ModelServer(lambda request, call: replies[min(call, len(replies)) - 1]) as server:
            async with open_client(config.Server(base_url=server.url, model="m")) as conversation:
                trajectory = await rollout(
                    QUESTION,
                    settings=settings,
                    sampling=resolve("greedy", config.Sampling()),
                    seed=number,
                    complete=conversation(),
                    search=searching,
                    page_text=lambda file, page: PAGES[file, page],
                    deadline_s=60,
                )
        return to_row(trajectory, rollout_id=f"r{number}", attempt=1, sample=0, **facts)

    rows = [asyncio.run(run(replies, number)) for number, replies in enumerate(conversations)]
    made = artifact.provenance(settings={"agent": settings.model_dump(), "search": config.Search().model_dump()})
    return artifact.write_table(artifact.table_of(rows, "trajectories/2"), uri, "trajectories/2", made)


def older(text: str, cut_off: bool) -> list[Block]:
    """A parser that mends nothing."""
    blocks = read_calls(text, cut_off)
    return [] if any(block.mended for block in blocks) else blocks


@pytest.mark.parametrize("protocol", ["tools", "tags"])
@pytest.mark.parametrize(
    "agent", [{"max_iterations": 3}, {"answer": False, "max_iterations": 2}, {"max_iterations": 4}]
)
def test_the_same_parser_changes_nothing(index: Artifact, tmp_path: Path, protocol: str, agent: dict[str, Any]) -> None:
    stored = collected(index, f"{tmp_path}/t.parquet", protocol, CONVERSATIONS[protocol], **agent)
    again, changes = reparse(stored, index, str(tmp_path / "again"))
    assert artifact.read_rows(again) == artifact.read_rows(stored)
    counted = read_changes(changes)
    assert counted["rollouts"] == {"all": len(CONVERSATIONS[protocol])}
    assert counted["before"] == counted["after"]


def test_what_is_read_now_is_searched_but_was_not_shown(
    index: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = [Reply(BROKEN), Reply("no"), Reply(None, None, [ANSWER])]
    with monkeypatch.context() as patch:
        patch.setattr(protocol_tools, "read_calls", older)
        stored = collected(index, f"{tmp_path}/t.parquet", "tools", [said, [Reply(BROKEN)]], max_iterations=3)
    before, _ = artifact.read_rows(stored)
    assert [turn["action"] for turn in before["turns"]] == ["none", "none", "answer"]
    again, changes = reparse(stored, index, str(tmp_path / "again"))
    after, still = artifact.read_rows(again)
    first = after["turns"][0]
    assert (first["action"], first["failure"], first["read_by"], first["repaired"]) == ("search", None, "reparse", True)
    (search,) = first["searches"]
    assert (search["query"], search["gt_rank"], search["rank_score"], search["shown"]) == (
        "pump degrees",
        1,
        1.0,
        False,
    )
    assert after["turns"][1:] == before["turns"][1:]
    unchanged = set(before) - {"turns"}
    assert {name: after[name] for name in unchanged} == {name: before[name] for name in unchanged}
    assert [place["seen"] for place in after["citations"]] == [False, False]
    # in the turn that must answer, a search is still none, and not run
    assert [(len(t["searches"]), t["failure"]) for t in still["turns"]] == [(1, None), (1, None), (0, "not_an_answer")]
    assert still["outcome"] == "out_of_turns"
    assert read_changes(changes)["turns"] == {"none → search": 3}
    assert "| with a valid action | 4 | 66.7% |" in turns_markdown(again)
    assert "| read by: reparse, repaired | 3 | 50.0% |" in turns_markdown(again)
    assert "| Turns with a valid action, after | 4 of 6 (66.7%) |" in markdown(read_changes(changes))


def test_an_answer_that_is_read_now_ends_the_rollout(
    index: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = [Reply(None, None, [SEARCH]), Reply(BROKEN_ANSWER), Reply(None, None, [SEARCH])]
    with monkeypatch.context() as patch:
        patch.setattr(protocol_tools, "read_calls", older)
        stored = collected(index, f"{tmp_path}/t.parquet", "tools", [said], max_iterations=3)
    (before,) = artifact.read_rows(stored)
    assert (before["outcome"], len(before["turns"])) == ("out_of_turns", 3)
    again, changes = reparse(stored, index, str(tmp_path / "again"))
    (after,) = artifact.read_rows(again)
    assert (after["outcome"], after["answer"], len(after["turns"])) == ("answered", ["85"], 2)
    assert after["messages"] == before["messages"][: len(after["messages"])]
    assert after["messages"][-1] == {"role": "assistant", "content": BROKEN_ANSWER, "images": None}
    assert after["completion_tokens"] == sum(turn["completion_tokens"] for turn in before["turns"][:2])
    assert 0 <= after["elapsed_s"] < before["elapsed_s"]
    assert read_changes(changes)["outcomes"] == {"out_of_turns → answered": 1}
    # and the other way round: an older parser, asked again, would take it back
    monkeypatch.setattr(protocol_tools, "read_calls", older)
    (undone,) = artifact.read_rows(reparse(again, index, str(tmp_path / "undone"))[0])
    assert (undone["outcome"], undone["answer"], undone["turns"][-1]["read_by"]) == ("out_of_turns", [], None)


def test_a_page_that_was_shown_is_seen_also_where_its_query_is_read_otherwise_now(
    index: Artifact, tmp_path: Path
) -> None:
    stored = collected(
        index, f"{tmp_path}/t.parquet", "tools", [[Reply(None, None, [SEARCH]), Reply(None, None, [ANSWER])]]
    )
    (row,) = artifact.read_rows(stored)
    assert [place["seen"] for place in row["citations"]] == [True, False]
    row["turns"][0]["searches"][0]["query"] = "pump  degrees"  # as another parser read it
    uri, facts = f"{tmp_path}/other.parquet", artifact.read_provenance(stored)
    other = artifact.write_table(artifact.table_of([row], "trajectories/2"), uri, "trajectories/2", facts)
    (after,) = artifact.read_rows(reparse(other, index, str(tmp_path / "again"))[0])
    (search,) = after["turns"][0]["searches"]
    assert (search["query"], search["shown"]) == ("pump degrees", False)
    assert after["citations"] == row["citations"]


def test_a_rollout_of_one_search_that_gave_an_answer_ends_as_the_others_did(
    index: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As mined queries are: no answer was asked for."""
    stored = collected(
        index, f"{tmp_path}/t.parquet", "tools", [[Reply(BROKEN_ANSWER)]], max_iterations=1, answer=False
    )
    assert artifact.read_rows(stored)[0]["outcome"] == "answered"
    monkeypatch.setattr(protocol_tools, "read_calls", older)
    (undone,) = artifact.read_rows(reparse(stored, index, str(tmp_path / "undone"))[0])
    assert (undone["outcome"], undone["turns"][0]["action"]) == ("searched", "none")


def test_another_index_is_refused_where_it_would_be_searched(
    index: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = artifact.write_folder(
        shutil.copytree(index.uri, tmp_path / "copy"), f"{tmp_path}/other", "index/1", index.rows, {"another": True}
    )
    stored = collected(
        index, f"{tmp_path}/t.parquet", "tools", [[Reply(None, None, [SEARCH]), Reply(None, None, [ANSWER])]]
    )
    reparse(stored, other, str(tmp_path / "again"))
    monkeypatch.setattr(protocol_tools, "read_calls", older)
    stored = collected(index, f"{tmp_path}/t.parquet", "tools", [[Reply(BROKEN)]])
    monkeypatch.undo()
    with pytest.raises(ArtifactError, match="another index"):
        reparse(stored, other, str(tmp_path / "again"))


def test_a_rollout_that_ends_with_a_search_keeps_it(index: Artifact, tmp_path: Path) -> None:
    """Such are imported: what came after its last search is not known."""
    stored = collected(
        index, f"{tmp_path}/t.parquet", "tools", [[Reply(None, None, [SEARCH]), Reply(None, None, [ANSWER])]]
    )
    (row,) = artifact.read_rows(stored)
    row |= {"turns": row["turns"][:1], "outcome": "out_of_turns", "answer": [], "citations": []}
    uri, facts = f"{tmp_path}/ended.parquet", artifact.read_provenance(stored)
    ended = artifact.write_table(artifact.table_of([row], "trajectories/2"), uri, "trajectories/2", facts)
    again, changes = reparse(ended, index, str(tmp_path / "again"))
    assert artifact.read_rows(again) == artifact.read_rows(ended)
    assert [search["query"] for search in artifact.read_rows(again)[0]["turns"][0]["searches"]] == ["pump degrees"]
    assert read_changes(changes)["rollouts"] == {"all": 1}
