"""Reading tool calls, the server's and those left in the text: every form seen, and anything without an exception."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.agent import protocol_tools as tools
from tasks.agent.completion import Completion, ToolCall
from tasks.agent.message import PLACEHOLDER, without_placeholders
from tasks.agent.protocol import Answer, Step, as_stored, as_wire


def parse(text: str, *calls: ToolCall, reasoning: str | None = None) -> Step:
    return tools.parse(Completion(text, reasoning, calls, "stop", 1, 1, 0.0))


def call(name: str, arguments: object, id_: str = "c1") -> ToolCall:
    return ToolCall(id_, name, arguments if isinstance(arguments, str) else json.dumps(arguments))


SEARCH = '<tool_call>\n{"name": "search_documents", "arguments": {"query": "net income"}}\n</tool_call>'


@pytest.mark.parametrize(
    "text",
    [
        SEARCH,
        f"<think>why</think>\n\n{SEARCH}",
        f"why</think>{SEARCH}",
        f"<think>I call <tool_call> now</think>{SEARCH}",
        '<tool_call>{"name":"search_documents","arguments":{"query":"net income"}}',  # never closed
        '<tool_call>{"name": "search_documents", "arguments": "{\\"query\\": \\"net income\\"}"}</tool_call>',
        '{"name": "search_documents", "parameters": {"query": "net  income"}}',
        '```json\n{"name": "search_documents", "arguments": {"query": "net income"}}\n```',
    ],
)
def test_search_left_in_the_text(text: str) -> None:
    step = parse(text)
    assert (step.action, step.queries) == ("search", ["net income"])
    assert step.raw_text == text
    assert step.message == {"role": "assistant", "content": text}
    assert tools.reply(step, ["seen"])[0]["role"] == "tool"


def test_search_parsed_by_the_server() -> None:
    step = parse("", call("search_documents", '{"query":"net income"}'), reasoning="why")
    assert step.raw_text == f"<think>\nwhy\n</think>\n{SEARCH}"
    assert step.message["tool_calls"][0]["function"]["arguments"] == '{"query": "net income"}'
    assert as_stored(step.message) == {"role": "assistant", "content": step.raw_text}
    assert (step.queries, step.reasoning) == (["net income"], "why")
    assert tools.reply(step, ["seen"]) == [{"role": "tool", "tool_call_id": "c1", "content": "seen"}]


def test_all_searches_of_a_turn_are_asked_for() -> None:
    step = parse("", call("search_documents", {"query": "a"}, "1"), call("search_documents", {"query": "b"}, "2"))
    assert step.queries == ["a", "b"]
    assert [m["tool_call_id"] for m in tools.reply(step, ["x", "y"])] == ["1", "2"]
    assert parse(SEARCH + "\n" + SEARCH).queries == ["net income"] * 2


def test_a_wrong_call_beside_a_right_one_is_answered_too() -> None:
    step = parse("", call("fly", {}, "1"), call("search_documents", {"query": "b"}, "2"))
    assert (step.action, step.queries, step.asks[0].failure) == ("search", ["b"], "unknown_tool")
    assert len(tools.reply(step, ["no", "seen"])) == 2


@pytest.mark.parametrize(
    ("name", "arguments", "failure"),
    [
        ("fly", {}, "unknown_tool"),
        ("search_documents", "{broken", "unparsable_call"),
        ("search_documents", "[1]", "bad_arguments"),
        ("search_documents", {}, "bad_arguments"),
        ("search_documents", {"query": 3}, "bad_arguments"),
        ("search_documents", {"query": " "}, "empty_query"),
        ("provide_answer", {"answer": []}, "bad_arguments"),
        ("provide_answer", {"answer": {"a": 1}}, "bad_arguments"),
        ("provide_answer", {}, "bad_arguments"),
    ],
)
def test_failure(name: str, arguments: object, failure: str) -> None:
    step = parse("", call(name, arguments))
    assert step.action == "none"
    assert [ask.failure for ask in step.asks] == [failure]


@pytest.mark.parametrize("text", ["I do not know.", "", "<think>hm", '{"a": 1}'])
def test_no_call(text: str) -> None:
    step = parse(text)
    assert [ask.failure for ask in step.asks] == ["no_action"]
    assert tools.reply(step, ["Error"]) == [{"role": "user", "content": "Error"}]


def test_garbled_call_in_the_text() -> None:
    assert [ask.failure for ask in parse("<tool_call>{{{nope</tool_call>").asks] == ["unparsable_call"]


def test_broken_arguments_do_not_go_back_as_a_call() -> None:
    step = parse("", call("search_documents", "{broken"))
    assert "tool_calls" not in step.message
    assert tools.reply(step, ["Error"]) == [{"role": "user", "content": "Error"}]


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (
            {"answer": ["a", "b"], "citations": [{"file": "x.pdf", "page": 3}]},
            Answer(("a", "b"), (("x.pdf", 3),)),
        ),
        ({"answer": "a"}, Answer(("a",), ())),
        ({"answer": [1, 2.5]}, Answer(("1", "2.5"), ())),
        ({"answer": "a", "citations": [{"file": "x", "page": "page 3"}, {"file": 1}, 7]}, Answer(("a",), (("x", 3),))),
        ({"answer": "a", "citations": "x"}, Answer(("a",), ())),
        ({"answer": "a", "citations": [{"file": "x", "page": 10**20}]}, Answer(("a",), ())),
    ],
)
def test_answer(arguments: object, answer: Answer) -> None:
    step = parse("", call("provide_answer", arguments))
    assert (step.action, step.answer) == ("answer", answer)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["name", "arguments", "query", "answer", "citations", "file", "page"]), inner)
    ),
    max_leaves=8,
)
TAGS = ["<tool_call>", "</tool_call>", "<think>", "</think>"]
CALL = ['{"name": "search_documents", "arguments": ', '"query": ', "{", "}", '"']
PIECES = st.sampled_from([*TAGS, *CALL, "```", "\n", "\\ud800", "\ud800", "\\ufffc", "\ufffc", "[" * 100_000])
TEXTS = st.lists(PIECES | JSON.map(json.dumps) | st.text(max_size=8), max_size=10).map("".join)
NAMES = st.sampled_from(["search_documents", "provide_answer"]) | st.text(max_size=5)


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.lists(st.builds(ToolCall, st.text(max_size=3), NAMES, JSON.map(json.dumps) | TEXTS), max_size=3))
def test_anything_is_read_without_an_exception(text: str, calls: list[ToolCall]) -> None:
    step = parse(text, *calls)
    assert step.action != "none" or step.asks[0].failure is not None
    assert len(tools.reply(step, ["x"] * len(step.asks))) <= max(1, len(step.asks))
    for part in (step.raw_text, as_stored(step.message)["content"], *step.queries):
        part.encode()
        assert PLACEHOLDER not in part


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(codec="utf-8"), min_size=1).map(without_placeholders).filter(str.split))
def test_what_is_taught_is_what_is_read(query: str) -> None:
    message = tools.search(None, query)
    assert parse(as_stored(message)["content"]).queries == [" ".join(query.split())]


_names = st.sampled_from(["search_documents", "provide_answer", "fly"]) | st.text()
_texts = st.text() | st.sampled_from([SEARCH, f"Why.\n{SEARCH}", f"{SEARCH}\n{SEARCH}", "<tool_call>{nope</tool_call>"])
_calls = st.lists(st.tuples(_names, st.text() | st.dictionaries(st.text(), st.text()).map(json.dumps)), max_size=3)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(_texts, _calls), max_size=4))
def test_a_stored_conversation_can_be_sent_again(turns: list[tuple[str, list[tuple[str, str]]]]) -> None:
    """Whatever the model wrote: what is sent is stored as it was, and every tool message answers a call."""
    sent = []
    for text, called in turns:
        step = parse(text, *(ToolCall(f"c{n}", *what) for n, what in enumerate(called)))
        sent += [step.message, *tools.reply(step, ["seen" for _ in step.asks])]
    stored = [as_stored(message) for message in sent]
    again = as_wire(stored)
    assert [as_stored(message) for message in again] == stored
    for message in again:
        for made in message.get("tool_calls", ()):
            assert isinstance(json.loads(made["function"]["arguments"]), dict)
    ids = [message["tool_call_id"] for message in again if message["role"] == "tool"]
    assert len(ids) == len(set(ids)) == sum(message["role"] == "tool" for message in sent)


def test_calls_are_sent_again_as_calls() -> None:
    step = parse("", call("search_documents", {"query": "a"}, "1"), call("search_documents", {"query": "b"}, "2"))
    sent = [step.message, *tools.reply(step, ["x", "y"])]
    again = as_wire([as_stored(message) for message in sent])
    assert again[0]["content"] == step.message["content"]
    assert [c["function"] for c in again[0]["tool_calls"]] == [c["function"] for c in step.message["tool_calls"]]
    assert [c["id"] for c in again[0]["tool_calls"]] == [message["tool_call_id"] for message in again[1:]]
