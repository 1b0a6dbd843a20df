"""The query language: what a query is read as, and that the fast way and the parser agree."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from whoosh import query

from tasks.search.query import (
    ANY,
    MAX_PARSED,
    MAX_WORDS,
    PAGE,
    Operator,
    UnreadableQuery,
    as_words,
    is_plain,
    parse,
    read,
    read_with,
)


def T(*stems: str, field: str = ANY) -> list[query.Term]:
    return [query.Term(field, stem) for stem in stems]


def test_words_are_joined_by_the_operator() -> None:
    assert read("the net revenues of 2020?", "or").tree == query.Or(T("net", "revenu", "2020"))
    assert read("the net revenues of 2020?", "and").tree == query.And(T("net", "revenu", "2020"))
    assert read("revenue revenues", "or").tree == T("revenu")[0]


def test_the_question_s_words_are_ranked_but_not_demanded() -> None:
    assert read_with("revenues", "What fell?", "or").tree == query.Or(T("revenu", "what", "fell"))
    strict = query.AndMaybe(query.And(T("net", "revenu")), query.Or(T("what", "fell")))
    assert read_with("net revenues", "What fell?", "and").tree == strict
    assert read_with("the", "What fell?", "and").tree == query.Or(T("what", "fell"))


@pytest.mark.parametrize(
    ("text", "tree"),
    [
        ("cat AND dog", query.And(T("cat", "dog"))),
        ("cat OR dog OR owl", query.Or(T("cat", "dog", "owl"))),
        ("cat NOT dog", query.AndNot(T("cat")[0], T("dog")[0])),
        ("cat OR NOT dog", query.AndNot(T("cat")[0], T("dog")[0])),
        ("NOT dog", query.AndNot(query.Every(), T("dog")[0])),
        ("NOT (NOT dog)", query.AndNot(query.Every(), query.AndNot(query.Every(), T("dog")[0]))),
        ("cat ANDNOT dog", query.AndNot(*T("cat", "dog"))),
        ("cat ANDMAYBE dog", query.AndMaybe(*T("cat", "dog"))),
        ("cat REQUIRE dog", query.Require(*T("cat", "dog"))),
        ("cat AND (dog owl)", query.And([*T("cat"), query.Or(T("dog", "owl"))])),
        ("'cat dog'", query.Or(T("cat", "dog"))),
        ('"guide dogs"', query.Phrase(ANY, ["guid", "dog"])),
        ('"dogs"', T("dog")[0]),
        ('"state of the union"', query.Phrase(ANY, ["state", None, None, "union"])),
        (
            '"guide dogs"~2',
            query.Or([query.Phrase(ANY, ["guid", "dog"]), query.Phrase(ANY, ["guid", None, "dog"])]),
        ),
        ("title:dogs", T("dog", field="title")[0]),
        ("title:(cat dogs)", query.Or(T("cat", "dog", field="title"))),
        ("file:report_2020.pdf", query.And(T("report", "2020", "pdf", field="file"))),
        ("covid-19 flu", query.Or(T("covid", "19", "flu"))),
        ("flu NOT covid-19", query.AndNot(T("flu")[0], query.And(T("covid", "19")))),
        ("dog^2.5", query.Term(ANY, "dog", boost=2.5)),
        ("(cat dog^2)^3", query.Or([query.Term(ANY, "cat", boost=3.0), query.Term(ANY, "dog", boost=6.0)])),
        ("Reven*", query.Wildcard(ANY, "reven*")),
        ("wom?n", query.Wildcard(ANY, "wom?n")),
        ("covid-1*", query.And([*T("covid"), query.Wildcard(ANY, "1*")])),
        ("[Apple TO cat}", query.TermRange(ANY, "apple", "cat", endexcl=True)),
        ("page_number:5", query.NumericRange(PAGE, 5, 5)),
        ("page_number:{2 TO 7]", query.NumericRange(PAGE, 3, 7)),
        ("page_number:[2 TO 7}", query.NumericRange(PAGE, 2, 6)),
        ("*:*", query.Every()),
        ("at 10:30:15", query.Or(T("10", "30", "15"))),
        ("unknown:dog", query.Or(T("unknown", "dog"))),
    ],
)
def test_what_the_language_means(text: str, tree: query.Query) -> None:
    reading = read(text, "or")
    assert reading.tree == tree
    assert reading.read_as == "query"
    assert reading.searched == text


@pytest.mark.parametrize(
    ("text", "searched"),
    [
        ("NOT AND dog", "not and dog"),
        ("page_number:five", "page_number five"),
        ('"a cat"~900 "b cat dog owl"~900', "a cat  900  b cat dog owl  900"),
        ("(" * 900 + "dog" + ")" * 900, "dog"),
        ("(" * 90 + "dog" + ")" * 90, "dog"),
        ("dog " + "AND dog " * MAX_PARSED, ("dog " + "and dog " * MAX_PARSED).strip()),
        ("cat" + " ANDNOT dog" * 40, "cat" + " andnot dog" * 40),
    ],
)
def test_what_cannot_be_read_is_searched_as_words(text: str, searched: str) -> None:
    reading = read(text, "or")
    assert reading.read_as == "words"
    assert reading.searched.split() == searched.replace("~", " ").split()
    assert reading.tree is not None


@pytest.mark.parametrize("text", ["", "   ", "the of", "\x00", "?", "🎉", "((", "NOT the", '""'])
def test_nothing_to_search(text: str) -> None:
    assert read(text, "or").tree is None
    assert read(text, "and").read_as == "words"


def test_a_very_long_query_is_cut() -> None:
    tree = read(" ".join(f"w{i}" for i in range(3 * MAX_WORDS)), "or").tree
    assert tree is not None
    assert len(tree.subqueries) == MAX_WORDS


OPERATORS = st.sampled_from(["or", "and"])
PIECES = "revenue Revenues the covid-19 company's don't U.S. 10:30 3.5% $5 what? it?! and Or notes: x_y a/b e~2 tail] état ΣΑΣ İ"
PIECES += " मुंबई 東京 مرحبا؟ 🎉"
PLAIN_PIECES = st.sampled_from([*PIECES.split(), "\n", "\u00a0"])
PLAIN = st.lists(PLAIN_PIECES | st.text("abc é'-.,;:!?_\t/&%$#@+=|\\<>~`", max_size=8), max_size=8).map(" ".join)


@settings(max_examples=300, deadline=None)
@given(PLAIN, OPERATORS)
def test_plain_words_have_the_tree_that_the_parser_gives(text: str, operator: Operator) -> None:
    if not is_plain(text):
        text = as_words(text)
    reading = read(text, operator)
    if reading.tree is None:
        with pytest.raises(UnreadableQuery):
            parse(text, operator)
    else:
        assert parse(text, operator) == reading.tree


ANYTHING = st.text(st.characters() | st.sampled_from("abc \"'*?()[]{}:^~<>\\/"), max_size=60) | st.lists(
    st.sampled_from(
        ['"', "(", ")", "NOT", "AND", "OR", "ANDMAYBE", "TO", "[", "}", "text:", "*", "?", "^2", "~3", "dog", "cat"]
    ),
    max_size=12,
).map(" ".join)


@settings(max_examples=300, deadline=None)
@given(ANYTHING, OPERATORS)
def test_no_text_is_an_error_and_what_was_searched_reads_the_same_again(text: str, operator: Operator) -> None:
    reading = read(text, operator)
    assert is_plain(as_words(text))
    assert read(reading.searched, operator).tree == reading.tree
