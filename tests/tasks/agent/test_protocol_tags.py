"""Reading plain text: every form that a model was seen to write, and anything at all without an exception."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tasks.agent import protocol_tags as tags
from tasks.agent.completion import Completion
from tasks.agent.message import PLACEHOLDER
from tasks.agent.protocol import Answer, Step


def parse(text: str, reasoning: str | None = None, finish_reason: str = "stop") -> Step:
    return tags.parse(Completion(text, reasoning, (), finish_reason, 1, 1, 0.0))


@pytest.mark.parametrize(
    ("text", "query", "reasoning"),
    [
        ("<think>why</think>\n<search>net income</search>", "net income", "why"),
        ("<search>net income</search>", "net income", None),
        ("why</think><search>net income</search>", "net income", "why"),  # the template wrote <think>
        ("<think>why\n<search>net income</search>", "net income", "why"),  # never closed
        ("<think>why <search>net income</search></think>", "net income", "why"),  # closed too late
        ("<think>I use <search> now</think><search>net income</search>", "net income", "I use <search> now"),
        ("<search>net income", "net income", None),  # the stop string was cut off
        ("Sure! I look.\n<SEARCH>\n net\n income </Search> done", "net income", "Sure! I look."),
        ("<search>net income</search><results>made up</results><answer>7</answer>", "net income", None),
        ('<search lang="en">"net income" AND 2019</search>', '"net income" AND 2019', None),
        ("<search>net <b>income</b></search>", "net income", None),
    ],
)
def test_search(text: str, query: str, reasoning: str | None) -> None:
    step = parse(text)
    assert (step.action, step.queries, step.reasoning) == ("search", [query], reasoning)
    assert step.raw_text == text


def test_conversation_keeps_nothing_after_the_action_and_closes_it() -> None:
    step = parse("<search>a</search><results>made up</results>")
    assert step.message == {"role": "assistant", "content": "<search>a</search>"}
    assert parse("<think>x</think>\n<search>a").message["content"] == "<think>x</think>\n<search>a</search>"


def test_reasoning_that_the_server_took_out_is_put_back() -> None:
    step = parse("<search>a</search>", reasoning="because")
    assert step.raw_text == "<think>\nbecause\n</think>\n\n<search>a</search>"
    assert (step.reasoning, step.queries) == ("because", ["a"])


@pytest.mark.parametrize(
    ("text", "texts", "citations"),
    [
        ('<answer>42 <cite file="a b.pdf" page="3"/></answer>', ("42",), (("a b.pdf", 3),)),
        ("<answer>42 <cite page='3' file='a.pdf'></answer>", ("42",), (("a.pdf", 3),)),
        ("<answer>42 <cite>a.pdf page 3</cite></answer>", ("42",), (("a.pdf", 3),)),
        ("<answer>42 <cite>a.pdf, p. 3</cite></answer>", ("42",), (("a.pdf", 3),)),
        ("<answer>42 <cite>see above</cite></answer>", ("42",), ()),
        ('<answer>42 <cite file="a.pdf" page="3, 5"/></answer>', ("42",), (("a.pdf", 3), ("a.pdf", 5))),
        ('<answer>42 <cite file="a.pdf" pages="3-5"/></answer>', ("42",), (("a.pdf", 3), ("a.pdf", 4), ("a.pdf", 5))),
        ("<answer>42 <cite>a.pdf, pages 3 and 5</cite></answer>", ("42",), ()),
        ("<answer>42 <cite>a.pdf, pp. 3–4</cite></answer>", ("42",), (("a.pdf", 3), ("a.pdf", 4))),
        ('<answer>42 <cite file="a.pdf#page=3" page="4"/></answer>', ("42",), (("a.pdf#page=3", 4),)),
        ('<answer>42 <cite file="a.pdf" page="1-9999"/></answer>', ("42",), (("a.pdf", 1),)),
        ('<answer>42 <cite file="a.pdf" page="3 of 12"/></answer>', ("42",), (("a.pdf", 3),)),
        ('<answer>42 <cite file="a.pdf" page="3.5"/></answer>', ("42",), (("a.pdf", 3),)),
        ('<answer>42 <cite file="a.pdf" page="0"/></answer>', ("42",), ()),
        ("<answer>\nParis\n Rome \n</answer>", ("Paris", "Rome"), ()),
        ("<answer>42", ("42",), ()),
        ('<answer>1 <cite file="a" page="1"/><cite file="a" page="1"/></answer>', ("1",), (("a", 1),)),
    ],
)
def test_answer(text: str, texts: tuple[str, ...], citations: tuple[tuple[str, int], ...]) -> None:
    step = parse(text)
    assert step.action == "answer"
    assert step.answer == Answer(texts, citations)


@pytest.mark.parametrize(
    ("text", "finish_reason", "failure"),
    [
        ("I do not know.", "stop", "no_action"),
        ("", "stop", "no_action"),
        ("<think>hm</think>", "stop", "no_action"),
        ("<search> \n </search>", "stop", "empty_query"),
        ("<answer></answer>", "stop", "bad_arguments"),
        ("<search>a a a a", "length", "unparsable_call"),
    ],
)
def test_failure(text: str, finish_reason: str, failure: str) -> None:
    step = parse(text, finish_reason=finish_reason)
    assert step.action == "none"
    assert [ask.failure for ask in step.asks] == [failure]
    assert step.asks[0].detail


TAGS = ["<think>", "</think>", "<search>", "</search>", "<answer>", "</answer>", "<cite ", "</cite>"]
PIECES = st.sampled_from(
    [*TAGS, 'file="', 'page="', '"', "/>", "<", ">", "</", "\n", " ", "word", "3", "\ud800", "\0", "\ufffc"]
)
TEXTS = st.lists(PIECES | st.text(max_size=8), max_size=15).map("".join)


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.none() | TEXTS, st.sampled_from(["stop", "length"]))
@example("<search>" * 2000, None, "stop")
@example("<cite " * 2000, None, "stop")
def test_anything_is_read_without_an_exception(text: str, reasoning: str | None, finish_reason: str) -> None:
    step = parse(text, reasoning, finish_reason)
    assert (step.action == "none") == (not step.queries and step.answer is None)
    assert step.action != "none" or step.asks[0].failure is not None
    for part in (step.raw_text, step.message["content"], step.reasoning or "", *step.queries):
        part.encode()
        assert PLACEHOLDER not in part


@settings(max_examples=100, deadline=None)
@given(st.text('ab cd"()*', min_size=1).filter(str.strip), st.none() | st.text("ef gh", min_size=1).filter(str.strip))
def test_what_is_taught_is_what_is_read(query: str, reasoning: str | None) -> None:
    step = parse(tags.search(reasoning, query)["content"])
    assert step.queries == [" ".join(query.split())]
    assert step.reasoning == (reasoning.strip() if reasoning else None)
    cited = Answer(("x", "y"), (("a.pdf", 2),))
    assert parse(tags.answer(reasoning, cited)["content"]).answer == cited
