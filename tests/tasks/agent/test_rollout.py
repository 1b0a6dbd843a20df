"""The loop against a real server and a real index: what it records, and that nothing is lost however it ends."""

import asyncio
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tasks import artifact, config
from tasks.agent import client as client_module
from tasks.agent.client import open_client
from tasks.agent.completion import Completion
from tasks.agent.message import Message
from tasks.agent.observation import PageText
from tasks.agent.prompts import PROTOCOLS, prompt_fingerprint, prompt_messages
from tasks.agent.protocol import Step
from tasks.agent.rollout import rollout, search_with
from tasks.agent.sampling import resolve
from tasks.agent.trajectory import Question, SearchRecord, Trajectory, to_row
from tasks.errors import InputError
from tasks.search.index import Searcher, build_index, open_index
from tests.model_server import Die, Drop, Hang, ModelServer, Reply, Script, Status

PAGES = {
    ("pump.pdf", 1): "The Orion pump. Introduction and safety.",
    ("pump.pdf", 2): "The pump must not run above 85 degrees Celsius.",
    ("lease.pdf", 1): "The tenant shall pay rent monthly in advance.",
}
QUESTION = Question("q1", "How hot may the pump get?", [["85 °C"]], [("pump.pdf", 2)], "text", "train")
FACTS = {"model": "base", "model_fingerprint": "m", "index_fingerprint": "i", "code_fingerprint": "c"}


@pytest.fixture(scope="module")
def searcher(tmp_path_factory: pytest.TempPathFactory) -> Searcher:
    folder = tmp_path_factory.mktemp("index")
    rows = [
        {"file": f, "page_number": p, "total_pages": 2, "title": None, "text": t, "text_source": "pdf"}
        for (f, p), t in PAGES.items()
    ]
    rows = [{**row, "source_uri": None, "source_sha256": None} for row in rows]
    pages = artifact.write_table(artifact.table_of(rows, "pages/2"), f"{folder}/pages.parquet", "pages/2", {})
    return open_index(build_index(pages, config.Index(), str(folder / "index")), config.Search())


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_FIRST_DELAY_S", 0.01)


def searches_of(trajectory: Trajectory) -> list[SearchRecord]:
    """All searches of all turns, in order."""
    return [search for turn in trajectory.turns for search in turn.searches]


async def run(
    script: Script,
    searcher: Searcher,
    *,
    deadline_s: float = 30.0,
    timeout: float = 10.0,
    page_text: PageText = lambda file, page: PAGES[file, page],
    earlier: Sequence[Message] = (),
    **agent: Any,
) -> tuple[Trajectory, ModelServer]:
    settings = config.Agent(**agent)
    with ModelServer(script) as server:
        asked = config.Server(base_url=server.url, model="base", max_retries=1, request_timeout=timeout)
        async with open_client(asked) as conversation:
            trajectory = await rollout(
                QUESTION,
                settings=settings,
                sampling=resolve("greedy", config.Sampling()),
                seed=3,
                complete=conversation(),
                search=search_with(searcher, settings.top_k),
                page_text=page_text,
                deadline_s=deadline_s,
                earlier=earlier,
            )
    row = to_row(trajectory, rollout_id="r", attempt=1, sample=0, **FACTS)
    artifact.table_of([row], "trajectories/2")  # every row, however the rollout ended, is one that can be stored
    return trajectory, server


def parse_tools(text: str) -> Step:
    return PROTOCOLS["tools"].parse(Completion(text, None, (), "stop", 1, 1, 0.0))


def says(*actions: Any) -> Script:
    """Each call gets the next action, later ones the last; a text is a reply."""
    replies = [Reply(action) if isinstance(action, str) else action for action in actions]
    return lambda request, call: replies[min(call, len(replies)) - 1]


def calls(*named: tuple[str, Any]) -> Reply:
    return Reply(None, tool_calls=[(n, a if isinstance(a, str) else json.dumps(a)) for n, a in named])


ANSWER = '<answer>85 °C <cite file="pump.pdf" page="2"/></answer>'
ANSWER_CALL = calls(("provide_answer", {"answer": ["85 °C"], "citations": [{"file": "pump.pdf", "page": 2}]}))


async def test_a_page_that_cannot_be_read_fails_its_rollout_alone(searcher: Searcher) -> None:
    def gone(file: str, page: int) -> str:
        raise InputError("the document is gone", file=file)

    trajectory, _ = await run(says("<search>pump degrees</search>"), searcher, page_text=gone, protocol="tags")
    assert (trajectory.status, trajectory.outcome) == ("failed", "unreadable")
    assert trajectory.failure_detail == "pump.pdf: the document is gone"


async def test_tags_from_question_to_answer(searcher: Searcher) -> None:
    searching = "<think>heat</think>\n<search>pump degrees</search>"
    trajectory, server = await run(says(searching, ANSWER), searcher, protocol="tags")
    assert (trajectory.status, trajectory.outcome, trajectory.failure_detail) == ("finished", "answered", None)
    assert (list(trajectory.answer), list(trajectory.citations)) == (["85 °C"], [("pump.pdf", 2)])
    assert [(t.turn, t.action, t.reasoning, t.failure) for t in trajectory.turns] == [
        (1, "search", "heat", None),
        (2, "answer", None, None),
    ]
    (search,) = searches_of(trajectory)
    assert (search.query, search.read_as, search.gt_rank, search.rank_score) == ("pump degrees", "query", 1, 1.0)
    assert [file for _, file, _, _ in search.results] == ["pump.pdf", "pump.pdf"]
    assert all(t.prompt_tokens and t.completion_tokens and t.latency_s > 0 for t in trajectory.turns)
    settings = config.Agent(protocol="tags")
    assert trajectory.prompt_fingerprint == prompt_fingerprint(settings)
    assert trajectory.messages[:2] == prompt_messages(QUESTION.question, settings)
    assert "[1] pump.pdf page 2\nThe pump must not run above 85" in trajectory.messages[3]["content"]
    # what is stored is what the server was sent, and then what it said
    assert trajectory.messages[:-1] == server.requests[-1]["messages"]
    assert trajectory.messages[-1] == {"role": "assistant", "content": ANSWER}
    assert [request["seed"] for request in server.requests] == [3, 3]


async def test_the_model_is_told_how_its_query_was_taken(searcher: Searcher) -> None:
    searches = [f"<search>{query}</search>" for query in ("pump degrees", "NOT AND pump", "zebra")]
    trajectory, server = await run(says(*searches, ANSWER), searcher, protocol="tags", observation="none")
    assert [search.read_as for search in searches_of(trajectory)] == ["query", "words", "query"]
    found, as_words, nothing = [message["content"] for message in server.requests[-1]["messages"][3::2]]
    assert found.startswith("<results>\n[1] pump.pdf page 2")
    assert as_words.startswith("<results>\nThe query could not be read as one and was searched as plain words.\n[1] ")
    assert nothing.startswith("<results>\nNo page was found.")


async def test_tools_from_question_to_answer(searcher: Searcher) -> None:
    two = calls(("search_documents", {"query": "rent"}), ("search_documents", {"query": "pump degrees"}))
    trajectory, server = await run(says(two, ANSWER_CALL), searcher, protocol="tools")
    assert (trajectory.outcome, list(trajectory.citations)) == ("answered", [("pump.pdf", 2)])
    assert [(s.query, s.gt_rank) for s in trajectory.turns[0].searches] == [("rent", None), ("pump degrees", 1)]
    sent = server.requests[1]["messages"]
    assert [m["role"] for m in sent] == ["system", "user", "assistant", "tool", "tool"]
    assert [c["id"] for c in sent[2]["tool_calls"]] == [m["tool_call_id"] for m in sent[3:]]
    assert all(set(message) == {"role", "content"} for message in trajectory.messages)
    assert trajectory.messages[2]["content"].count("<tool_call>") == 2
    assert json.loads(trajectory.tools or "") == server.requests[0]["tools"]
    assert server.requests[0]["tool_choice"] == "auto"


async def test_a_server_that_refuses_several_calls_in_a_message_gets_them_as_text(searcher: Searcher) -> None:
    two = calls(("search_documents", {"query": "rent"}), ("search_documents", {"query": "pump degrees"}))
    answered = says(two, two, ANSWER_CALL)

    def picky(request: dict[str, Any], call: int) -> Any:
        several = any(len(message.get("tool_calls", ())) > 1 for message in request["messages"])
        return (
            Status(400, '{"error": {"message": "only single tool-calls at once"}}')
            if several
            else answered(request, call)
        )

    trajectory, server = await run(picky, searcher, protocol="tools")
    assert (trajectory.outcome, len(trajectory.turns), len(server.requests)) == ("answered", 2, 3)
    assert [m["role"] for m in server.requests[-1]["messages"]] == ["system", "user", "assistant", "tool", "tool"]
    assert server.requests[-1]["messages"][:3] == trajectory.messages[:3]
    trajectory, server = await run(says(Status(400, "{}")), searcher, protocol="tools")
    assert (trajectory.outcome, len(server.requests)) == ("http_status", 1)


async def test_a_turn_says_who_read_it_and_a_citation_whether_it_was_seen(searcher: Searcher) -> None:
    served = calls(("search_documents", {"query": "pump degrees"}))
    broken = Reply('<tool_call>\n{"name": "search_documents", "arguments": {"query": "safety"}\n</tool_call>')
    cites = [{"file": "pump.pdf", "page": 2}, {"file": "lease.pdf", "page": 1}]
    answer = calls(("provide_answer", {"answer": ["85", "86"], "citations": cites}))
    trajectory, server = await run(says(served, broken, "I think.", answer), searcher, protocol="tools")
    assert [(t.read_by, t.repaired) for t in trajectory.turns] == [
        ("server", False),
        ("parser", True),
        (None, False),
        ("server", False),
    ]
    assert all(search.shown for search in searches_of(trajectory))
    assert '{"query": "safety"}}' in server.requests[-1]["messages"][4]["content"]  # as it was meant
    row = to_row(trajectory, rollout_id="r", attempt=1, sample=0, **FACTS)
    assert row["answer"] == ["85", "86"]
    assert [c["seen"] for c in row["citations"]] == [True, False]
    trajectory, _ = await run(says("<search>rent</search>"), searcher, answer=False, max_iterations=2)
    assert [search.shown for search in searches_of(trajectory)] == [True, False]


async def test_guided_turns_may_be_nothing_but_a_search_or_an_answer(searcher: Searcher) -> None:
    _, server = await run(says("<search>rent</search>"), searcher, protocol="tags", guided=True, max_iterations=2)
    regexes = [request["structured_outputs"]["regex"] for request in server.requests]
    may = [
        "<search>rent</search>",
        "<think>why</think>\n<search>a b</search>",
        ANSWER,
        "<answer></answer>",
        "<search> </search>",
    ]
    assert [[bool(re.fullmatch(regex, text)) for text in may] for regex in regexes] == [
        [True, True, True, False, False],
        [False, False, True, False, False],
    ]
    _, server = await run(says("<search>rent</search>"), searcher, guided=True, answer=False, max_iterations=1)
    assert not re.fullmatch(server.requests[0]["structured_outputs"]["regex"], ANSWER)

    script = says(calls(("search_documents", {"query": "x"})))
    _, server = await run(script, searcher, protocol="tools", guided=True, max_iterations=2)
    guides = [json.loads(request["structured_outputs"]["structural_tag"]) for request in server.requests]
    names = [[re.findall(r'"name": "(\w+)"', tag["begin"]) for tag in guide["format"]["tags"]] for guide in guides]
    assert names == [[["search_documents"], ["provide_answer"]], [["provide_answer"]]]
    assert [request["tool_choice"] for request in server.requests] == ["auto", "auto"]
    queries = ['{"query": "a b"}', '{"query": "\\"a\\" b"}', '{"query": " "}', '{"query": "a\\"}', "{}"]
    pattern = guides[0]["format"]["tags"][0]["content"]["pattern"]
    assert [bool(re.fullmatch(pattern, query)) for query in queries] == [True, True, False, False, False]
    # what begins and ends as the guide demands is a call in its one form
    search = guides[0]["format"]["tags"][0]
    assert parse_tools(f'{search["begin"]}{{"query": "x"}}{search["end"]}').queries == ["x"]


async def test_last_turn_must_answer(searcher: Searcher) -> None:
    search = "<search>rent</search>"
    trajectory, server = await run(says(search), searcher, protocol="tags", max_iterations=3)
    assert (trajectory.status, trajectory.outcome, len(searches_of(trajectory))) == ("finished", "out_of_turns", 2)
    assert [t.failure for t in trajectory.turns] == [None, None, "not_an_answer"]
    assert trajectory.turns[-1].action == "none"
    assert "cannot search any more" in server.requests[2]["messages"][-1]["content"]
    assert "cannot search any more" not in server.requests[1]["messages"][-1]["content"]
    script = says(calls(("search_documents", {"query": "x"})))
    _, server = await run(script, searcher, protocol="tools", max_iterations=2)
    assert server.requests[1]["tool_choice"]["function"]["name"] == "provide_answer"


@pytest.mark.parametrize(
    ("protocol", "bad", "failure"),
    [
        ("tags", "I think it is hot.", "no_action"),
        ("tags", "<search></search>", "empty_query"),
        ("tags", Reply("<search>a a", finish_reason="length"), "unparsable_call"),
        ("tools", "I think it is hot.", "no_action"),
        ("tools", "<tool_call>{nope</tool_call>", "unparsable_call"),
        ("tools", calls(("search_documents", "{nope")), "unparsable_call"),
        ("tools", calls(("search_documents", {"q": 1})), "bad_arguments"),
        ("tools", calls(("fly", {})), "unknown_tool"),
    ],
)
async def test_a_models_mistake_costs_a_turn_and_is_told(
    searcher: Searcher, protocol: str, bad: Any, failure: str
) -> None:
    answer = ANSWER if protocol == "tags" else ANSWER_CALL
    trajectory, server = await run(says(bad, answer), searcher, protocol=protocol)
    assert (trajectory.outcome, len(trajectory.turns)) == ("answered", 2)
    assert (trajectory.turns[0].action, trajectory.turns[0].failure) == ("none", failure)
    assert trajectory.turns[0].failure_detail
    assert server.requests[1]["messages"][-1]["content"].startswith("Error: ")


@pytest.mark.parametrize(
    ("fault", "outcome"),
    [
        (Status(503), "server_error"),
        (Status(200, "garbage"), "server_error"),
        (Status(401), "http_status"),
        (Drop(), "connection"),
        (Die(), "connection"),
        (Hang(), "deadline"),
    ],
)
async def test_a_failing_server_is_typed_and_what_was_done_is_kept(
    searcher: Searcher, fault: Any, outcome: str
) -> None:
    script = says("<search>pump</search>", fault)
    trajectory, _ = await run(script, searcher, protocol="tags", timeout=2.0 if isinstance(fault, Hang) else 60.0)
    assert (trajectory.status, trajectory.outcome) == ("failed", outcome)
    assert trajectory.failure_detail
    assert len(searches_of(trajectory)) == 1
    assert trajectory.messages[-2]["content"] == "<search>pump</search>"


async def test_the_rollouts_own_deadline(searcher: Searcher) -> None:
    trajectory, _ = await run(says("<search>pump</search>", Hang()), searcher, protocol="tags", deadline_s=2.5)
    assert (trajectory.status, trajectory.outcome, len(trajectory.turns)) == ("failed", "deadline", 1)
    assert "2.5 s" in (trajectory.failure_detail or "")


async def test_a_conversation_that_outgrows_the_context_is_finished(searcher: Searcher) -> None:
    full = Status(400, '{"error": {"message": "maximum context length is 4096 tokens"}}')
    trajectory, _ = await run(says("<search>pump</search>", full), searcher, protocol="tags")
    assert (trajectory.status, trajectory.outcome, len(searches_of(trajectory))) == ("finished", "out_of_context", 1)
    trajectory, _ = await run(says(full), searcher, protocol="tags")  # but a prompt that never fits is a wrong setting
    assert (trajectory.status, trajectory.outcome) == ("failed", "http_status")
    said: list[Message] = [{"role": "assistant", "content": "<search>a</search>"}, {"role": "user", "content": "none"}]
    trajectory, _ = await run(says(full), searcher, protocol="tags", earlier=said)  # as does a stored conversation
    assert (trajectory.status, trajectory.outcome, trajectory.turns) == ("finished", "out_of_context", [])


async def test_cancelling_cancels(searcher: Searcher) -> None:
    running = asyncio.create_task(run(says(Hang()), searcher))
    await asyncio.sleep(0.3)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_a_mistake_of_ours_is_raised(searcher: Searcher, tmp_path: Path) -> None:
    def broken(query: str, question: str) -> Any:
        raise TimeoutError("not the rollout's deadline")

    with ModelServer(says("<search>x</search>")) as server:
        async with open_client(config.Server(base_url=server.url, model="base")) as conversation:
            with pytest.raises(TimeoutError, match="not the rollout's"):
                await rollout(
                    QUESTION,
                    settings=config.Agent(protocol="tags"),
                    sampling=resolve("greedy", config.Sampling()),
                    seed=0,
                    complete=conversation(),
                    search=broken,
                    page_text=lambda file, page: "",
                    deadline_s=30,
                )
