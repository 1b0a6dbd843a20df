"""Calls out of text: what is mended and what is not, what servers leave of them, anything without inventing a word."""

import json
import re
import string
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from tasks.agent import protocol_tags, protocol_tools
from tasks.agent.calls import Call, read_calls
from tasks.agent.completion import Completion, ToolCall
from tasks.agent.message import PLACEHOLDER
from tasks.agent.protocol import Answer, Step, as_stored, call_text

A = '{"name": "search_documents", "arguments": {"query": "a"}}'
B = '{"name": "search_documents", "arguments": {"query": "b"}}'

TAG_INSIDE = '{"name": "search_documents", "arguments": {"query": "a </tool_call> b"}}'
TWO_LINES, LISTED = f"{A}\n{B}", f"[{A}, {B}]"


def parse(text: str, finish_reason: str = "stop", reasoning: str | None = None, *calls: ToolCall) -> Step:
    return protocol_tools.parse(Completion(text, reasoning, calls, finish_reason, 1, 1, 0.0))


def tagged(inside: str) -> str:
    return f"<tool_call>\n{inside}\n</tool_call>"


@pytest.mark.parametrize(
    ("inside", "queries"),
    [
        (A[:-1], ["a"]),  # dropped braces
        (A[:-2], ["a"]),
        (A + "}", ["a"]),  # one too many
        (A + "]}", ["a"]),
        ('{"name": "search_documents", "arguments": {"query": "a",}}', ["a"]),
        ('{"name": "search_documents", "arguments": {"query": "a" , }', ["a"]),
        ('{"name": "search_documents", "arguments": {"query": "a\nb\tc"}}', ["a b c"]),
        ('{"name": "search_documents", "arguments": "{\\"query\\": \\"a\\""}', ["a"]),
        (A[:-1] + "\n</tool_call>\n" + tagged(B)[:-12], ["a", "b"]),
        (f"{A}\n{B}}}", ["a", "b"]),
    ],
)
def test_a_slip_with_one_reading_is_mended(inside: str, queries: list[str]) -> None:
    step = parse(f"I look. {tagged(inside)}")
    assert (step.queries, step.read_by, step.repaired) == (queries, "parser", True)
    assert step.raw_text == f"I look. {tagged(inside)}"
    # the conversation shows the calls as they were meant, and reads the same
    shown = step.message["content"]
    assert shown.startswith("I look. <tool_call>")
    again = parse(shown)
    assert (again.queries, again.repaired, again.message["content"]) == (queries, False, shown)


@pytest.mark.parametrize(
    "inside",
    [
        '{"name": "search_documents", "arguments": {"query": "a',  # was there more?
        '{"name": "search_documents", "arguments": {"query": "a}}',
        '{"name": "search_documents", "arguments": {"query": "a", "x": ',
        '{"name": "search_documents", "arguments": {"query": "a",',
        '{"name": "search_documents", "arguments": {"query": "a",,}}',
        '{"name": "search_documents", "arguments": {"query": "net "income" 2019"}}',
        '{"name": "provide_answer", "arguments": {"answer": ["a", "b"}, "citations": []}}',  # } for ], or one dropped?
        '{"name": "provide_answer", "arguments": {"answer": ["a"]}}, "citations": []}',
        '{"name": "provide_answer", "arguments": {"answer": [,]}}',
        "{'name': 'search_documents', 'arguments': {'query': 'a'}}",
        '{"name": "search_documents" "arguments": {"query": "a"}}',
        '{"arguments": {"query": "a", "name": "search_documents"}',
        '{"name": "search_documents", "arguments": ' + "[" * 600 + "]" * 600 + "}",
        "<function=search_documents><parameter=query>a</function>",
        "<function=search_documents><parameter=query>a</parameter><parameter=query>b</parameter></function>",
        '{"name": "search_documents", "arguments": {"query": "a", "query": "b"}}',  # whole, and with two readings
        f"{A}; {B}",  # the second would be dropped
        f"{A} or maybe {B}",
        "search_documents",
        "",
    ],
)
def test_what_has_several_readings_is_not(inside: str) -> None:
    step = parse(tagged(inside))
    assert ([ask.failure for ask in step.asks], step.read_by, step.repaired) == (["unparsable_call"], None, False)
    assert step.message == {"role": "assistant", "content": tagged(inside)}


def test_what_ran_out_of_tokens_is_not_completed() -> None:
    cut = f"<tool_call>\n{A[:-2]}"
    assert parse(cut).queries == ["a"]
    assert [ask.failure for ask in parse(cut, "length").asks] == ["unparsable_call"]
    assert parse(f"<tool_call>\n{A}", "length").queries == ["a"]  # whole, but for its tag
    assert parse(f"{tagged(A[:-1])}<tool_call>", "length").queries == ["a"]


# (raw text, what vLLM 0.32 made of it with its parsers hermes and qwen3: reasoning, content, calls; what we read)
SERVED = [
    (f"<think>\nwhy {tagged(A)} hm\n</think>", "\nwhy ", "", [("search_documents", '{"query": "a"}')], ["a"]),
    (
        f"<think>w</think>{tagged(A)}{tagged(B[:-1])}",
        "w",
        f"{tagged(A)}{tagged(B[:-1])}",
        [],
        ["a", "b"],
    ),
    (
        '</think><tool_call>\n{"name": "search_documents", "arguments": "{\\"query\\": \\"a\\"}"}\n</tool_call>',
        None,
        "",
        [("search_documents", '"{\\"query\\": \\"a\\"}"')],
        ["a"],
    ),
    (
        '</think><tool_call>\n{"name": "search_documents", "parameters": {"query": "a"}}\n</tool_call>',
        None,
        '<tool_call>\n{"name": "search_documents", "parameters": {"query": "a"}}\n</tool_call>',
        [],
        ["a"],
    ),
    (
        f"</think>{tagged(TAG_INSIDE)}",
        None,
        tagged(TAG_INSIDE),
        [],
        ["a </tool_call> b"],
    ),
    (f"</think>{tagged(LISTED)}", None, tagged(LISTED), [], ["a", "b"]),
    (f"</think>{tagged(TWO_LINES)}", None, tagged(TWO_LINES), [], ["a", "b"]),
    (f"</think>x {tagged(A)} made up", None, "x ", [("search_documents", '{"query": "a"}')], ["a"]),
    (
        "</think>"
        + tagged(
            "<function=search_documents>\n<parameter=query>\nnet <b> income\n</parameter>\n</function>\n"
            "<function=fly></function>"
        ),
        None,
        tagged(
            "<function=search_documents>\n<parameter=query>\nnet <b> income\n</parameter>\n</function>\n"
            "<function=fly></function>"
        ),
        [],
        ["net <b> income"],
    ),
]


@pytest.mark.parametrize(("raw", "reasoning", "content", "calls", "queries"), SERVED)
def test_what_a_server_makes_of_it_is_read_as_the_raw_text_is(
    raw: str, reasoning: str | None, content: str, calls: list[tuple[str, str]], queries: list[str]
) -> None:
    assert parse(raw).queries == queries
    served = [ToolCall(f"id{n}", *call) for n, call in enumerate(calls)]
    step = parse(content, "tool_calls", reasoning, *served)
    assert step.queries == queries
    assert step.read_by == ("server" if calls and not calls[0][1].startswith('"') else "parser")
    assert parse(step.raw_text).asks == tuple(_renamed(step))


def test_a_server_may_lose_where_the_reasoning_ended() -> None:
    raw = f"<think>\nwhy <tool_call> {tagged(A)} hm\n</think>\n\n{tagged(B)}"
    assert parse(raw).queries == ["b"]
    step = parse(
        f"<tool_call> {tagged(A)} hm\n\n\n{tagged(B)}", "stop", "\nwhy "
    )  # what vLLM's qwen3 and hermes left of it
    assert (step.queries, step.reasoning, step.read_by) == (["a", "b"], "why", "parser")


def _renamed(step: Step) -> list[object]:
    """The asks as calls in text are named."""
    ids = iter(range(len(step.asks)))
    return [
        type(ask)(ask.query, ask.failure, ask.detail, f"call_{next(ids)}" if ask.call_id else None) for ask in step.asks
    ]


def test_arguments_that_the_server_broke_are_mended() -> None:
    step = parse("", "tool_calls", None, ToolCall("c1", "search_documents", '{"query": "a"'))
    assert (step.queries, step.read_by, step.repaired) == (["a"], "parser", True)
    assert step.message == {"role": "assistant", "content": tagged(A)}
    assert protocol_tools.reply(step, ["seen"])[0]["role"] == "tool"


def test_calls_in_the_reasoning_count_when_none_follows() -> None:
    thought = f"<think>first {tagged(A)}\n{tagged(B)} or {tagged(A)}</think>"
    assert parse(thought).queries == ["a", "b"]
    assert parse(thought).reasoning == "first"
    assert parse(f"{thought}\n\n{tagged(B)}").queries == ["b"]
    assert [ask.failure for ask in parse("<think>I could <tool_call>{</think> But no.").asks] == ["no_action"]


def test_a_text_of_json_that_names_no_arguments_is_no_call() -> None:
    assert parse(A).queries == ["a"]
    assert [ask.failure for ask in parse('{"name": "Alice"}').asks] == ["no_action"]


def test_answers_and_citations_in_strings() -> None:
    arguments = {"answer": '["a", "b"]', "citations": '[{"file": "x.pdf", "page": "2"}]'}
    step = parse(call_text("provide_answer", json.dumps(arguments)))
    assert step.answer is not None
    assert (step.answer.texts, step.answer.citations) == (("a", "b"), (("x.pdf", 2),))
    step = parse(call_text("provide_answer", '{"answer": "[sic] a"}'))
    assert step.answer is not None
    assert step.answer.texts == ("[sic] a",)


VALUES = st.text(string.printable + 'éß漢😀\\"{}[]<>/', max_size=25)
VALID = st.one_of(
    st.builds(lambda q: call_text("search_documents", json.dumps({"query": q})), VALUES),
    st.builds(lambda q: call_text("search_documents", json.dumps({"query": q}, ensure_ascii=False)), VALUES),
    st.builds(
        lambda a: call_text("provide_answer", json.dumps({"answer": a, "citations": []})), st.lists(VALUES, max_size=2)
    ),
    st.builds(lambda q: f"<function=search_documents>\n<parameter=query>\n{q}\n</parameter>\n</function>", VALUES),
    st.builds(lambda q: f"<search>{q}</search>", VALUES),
    st.builds(lambda q: f"<answer>{q}</answer>", VALUES),
)
TEXTS = st.lists(VALID | VALUES | st.sampled_from(["<think>", "</think>", "<tool_call>", "</tool_call>"]), max_size=4)


@st.composite
def mutated(draw: st.DrawFn) -> str:
    """Valid calls and other text, with pieces cut out, doubled or put in."""
    text = "".join(draw(TEXTS))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(text)))
        end = draw(st.integers(start, min(len(text), start + 12)))
        inserted = draw(
            st.sampled_from(["", "", '"', "}", "{", "]", "[", ",", "\n", "\\", "<", ">", text[start:end] * 2])
        )
        text = text[:start] + inserted + text[end:]
    return text


def _is_said(part: str, raw: str) -> bool:
    """Whether all words of a part stand in the raw text: as they are, as JSON may write them, or with tags between."""
    raw += re.sub(r"\\u[dD][89a-fA-F]\w\w", "?", raw)  # as which half a surrogate pair is read
    untagged = re.sub(r"</?[A-Za-z]+\b[^<>]*>", "", raw)

    def is_there(word: str) -> bool:
        forms = [json.dumps(word, ensure_ascii=ascii_)[1:-1] for ascii_ in (True, False)]
        return (
            any(form in raw for form in (word, *forms, *(json.dumps(form)[1:-1] for form in forms))) or word in untagged
        )

    return all(map(is_there, part.split()))


@settings(max_examples=600, deadline=None)
@example(call_text("search_documents", '{"query": "a\\ude00"}'), "stop")
@given(mutated(), st.sampled_from(["stop", "length", None]))
def test_no_word_is_invented_and_reading_again_changes_nothing(text: str, finish_reason: str | None) -> None:
    for protocol in (protocol_tools, protocol_tags):
        step = protocol.parse(Completion(text, None, (), finish_reason, 1, 1, 0.0))
        assert step.raw_text == text
        assert (step.action == "none") == (not step.queries and step.answer is None)
        for part in [*step.queries, *(step.answer.texts if step.answer else ())]:
            assert _is_said(part, text)
        again = protocol.parse(Completion(step.raw_text, None, (), finish_reason, 1, 1, 0.0))
        assert again == step
        # what the conversation shows is read as the same, and stays as it is
        shown = protocol.parse(Completion(as_stored(step.message)["content"], None, (), "stop", 1, 1, 0.0))
        if step.action != "none":
            assert (shown.queries, shown.answer) == (step.queries, step.answer)
            assert shown.message == step.message


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["search_documents", "fly"]), st.dictionaries(VALUES, VALUES, max_size=3)), max_size=3
    )
)
def test_calls_in_their_one_form_are_all_read(calls: list[tuple[str, dict[str, str]]]) -> None:
    text = "\n".join(call_text(name, json.dumps(arguments, ensure_ascii=False)) for name, arguments in calls)
    blocks = read_calls(text, cut_off=False)
    assert [call for block in blocks for call in block.calls] == [Call(*call) for call in calls]
    assert "".join(text[block.start : block.end] for block in blocks) == text.replace(
        "</tool_call>\n<", "</tool_call><"
    )


def test_a_name_that_stands_twice_has_two_readings() -> None:
    step = parse('<tool_call>\n{"name": "search_documents", "arguments": {"query": "a", "query": "b"}\n</tool_call>')
    assert [ask.failure for ask in step.asks] == ["unparsable_call"]


@settings(max_examples=150, deadline=None)
@given(st.data())
@pytest.mark.parametrize("action", ["search", "answer"])
@pytest.mark.parametrize("protocol", [protocol_tags, protocol_tools])
def test_whatever_a_guide_allows_is_a_valid_action(protocol: Any, action: str, data: st.DataObject) -> None:
    if protocol is protocol_tags:
        text = data.draw(st.from_regex(protocol_tags._GUIDES[action], fullmatch=True))
    else:
        name, arguments = protocol_tools._GUIDES[action]
        text = call_text(name, data.draw(st.from_regex(arguments, fullmatch=True)))
    assume(PLACEHOLDER not in text)  # which stands for an image, and is taken out
    step = protocol.parse(Completion(text, None, (), "stop", 1, 1, 0.0))
    assert (step.action, step.repaired) == (action, False)


LINES = st.text(st.characters(exclude_categories=["C", "Z"], exclude_characters='<>"\\'), min_size=1, max_size=40)
CITED = st.lists(st.tuples(LINES, st.integers(1, 9999)), max_size=15).map(tuple)


@settings(max_examples=100, deadline=None)
@given(st.lists(LINES, min_size=1, max_size=5).map(tuple), CITED)
def test_a_guide_allows_what_is_taught(texts: tuple[str, ...], citations: tuple[tuple[str, int], ...]) -> None:
    answer = Answer(texts, citations)
    assert re.fullmatch(protocol_tags._GUIDES["answer"], protocol_tags.answer(None, answer)["content"])
    name, arguments = protocol_tools._GUIDES["answer"]
    begin, end = call_text(name, "|").split("|")
    said = as_stored(protocol_tools.answer(None, answer))["content"]
    assert said.startswith(begin)
    assert said.endswith(end)
    assert re.fullmatch(arguments, said.removeprefix(begin).removesuffix(end))
    for query in texts:
        assert re.fullmatch(protocol_tags._GUIDES["search"], protocol_tags.search(None, query)["content"])
