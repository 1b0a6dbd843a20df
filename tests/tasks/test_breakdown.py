"""Results taken apart: every question stays counted once, and nothing is claimed where there are too few."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks import breakdown
from tasks.fate import FATES, Fate
from tests.tasks.test_compare import result

fates = st.lists(st.tuples(st.sampled_from(FATES), st.sampled_from(FATES)), min_size=1, max_size=40)


def rows(run: str, ends: list[Any], **others: Any) -> list[dict[str, Any]]:
    return [result(run, number, 1, fate=end, **others) for number, end in enumerate(ends)]


@given(fates)
@settings(max_examples=60, deadline=None)
def test_every_question_is_counted_once_in_its_run_and_once_on_its_way(pairs: list[Any]) -> None:
    before, after = (rows(run, list(ends)) for run, ends in zip("ab", zip(*pairs, strict=True), strict=True))
    counted = breakdown.ends({"a": before, "b": after})
    moved = breakdown.passages(before, list(reversed(after)))
    assert {run: counts.total() for run, counts in counted.items()} == {"a": len(pairs), "b": len(pairs)}
    for name in FATES:
        assert counted["a"][name] == sum(n for (old, _), n in moved.items() if old == name)
        assert counted["b"][name] == sum(n for (_, new), n in moved.items() if new == name)


def test_a_run_is_broken_when_most_questions_brought_no_search_or_most_turns_no_action() -> None:
    acts = {"turns": 2, "valid_turns": 1, "searches": 1}
    half = [*rows("half", ["never_retrieved"] * 2, **acts), *rows("half", ["unparsable"] * 2, **acts | {"searches": 0})]
    silent = [*half, *rows("silent", ["unparsable"], turns=1, valid_turns=1, searches=0)]
    unread = rows("unread", ["never_retrieved"] * 3, turns=3, valid_turns=1, searches=1)
    lost = rows("lost", ["errored"] * 3, turns=0, valid_turns=0, searches=0)
    typed = rows("question", ["found"], turns=None, searches=0)
    told = breakdown.broken({"half": half, "silent": silent, "unread": unread, "lost": lost, "question": typed})
    assert [line.partition(":")[0] for line in told] == [
        "silent made no search in 3 of 5 questions",
        "unread had a valid action in 3 of 9 turns",
    ]


def test_a_run_that_was_only_ranked_again_ended_in_no_way() -> None:
    ranked = rows("and", [None, None])
    assert breakdown.ends({"and": ranked}) == {}
    assert not breakdown.passages(rows("base", ["found", "found"]), ranked)


@given(st.sampled_from(FATES), st.sampled_from(FATES))
def test_a_question_ended_better_worse_or_the_same(old: Fate, new: Fate) -> None:
    answers = breakdown.changes(rows("base", [old], cited=0), rows("adapter", [new], cited=1))
    assert answers[old, new] == ("same" if old == new else "better" if FATES.index(new) < FATES.index(old) else "worse")
    assert {answers[old, new], answers[new, old]} in ({"same"}, {"better", "worse"})


def test_a_page_found_by_both_is_not_worse_for_an_answer_that_one_was_not_asked_for() -> None:
    typed, answered = rows("question", ["found"]), rows("adapter", ["answered_wrong"], cited=1)
    for pair in ((typed, answered), (answered, typed)):
        called = breakdown.changes(*pair)
        assert {called["found", fate] for fate in ("correct", "answered_wrong", "not_cited", "out_of_turns")} == {
            "same"
        }
        assert called["found", "never_retrieved"] == called["never_retrieved", "errored"] == "worse"
        assert (called["never_retrieved", "not_cited"], called["errored", "unparsable"]) == ("better", "same")


def test_categories_hold_all_questions_and_few_groups_get_no_interval() -> None:
    names = ["law"] * 20 + ["news"] * 4 + [None] * 2  # two questions a document
    tables = {
        run: [result(run, n, rank if n % 4 else None, category=name) for n, name in enumerate(names)]
        for run, rank in (("base", 2), ("adapter", 1))
    }
    law, news, nameless = breakdown.categories(tables, 200)
    assert [(c.name, c.questions, c.groups) for c in (law, news, nameless)] == [
        *(("law", 20, 10), ("news", 4, 2), ("no category", 2, 1))
    ]
    cell = law.cells["hit_at_1", "adapter"]
    assert (cell.mean, cell.n) == (0.75, 20)
    assert cell.low is not None
    assert cell.low < 0.75
    few = news.cells["hit_at_1", "adapter"]
    assert (few.mean, few.low, few.high) == (0.75, None, None)
    assert law.cells["hit_at_1", "base"].mean == 0
    assert breakdown.categories({"base": tables["base"][:20]}, 200) == []


def test_six_groups_are_enough_for_an_interval() -> None:
    rows = [result("base", n, 1, category="law" if n < 12 else "news") for n in range(22)]
    law, news = breakdown.categories({"base": rows}, 100)
    assert (law.groups, law.cells["hit_at_1", "base"].low is None) == (6, False)
    assert (news.groups, news.cells["hit_at_1", "base"].low) == (5, None)


def test_a_question_is_of_the_category_that_the_last_run_has_it_in() -> None:
    """Of runs measured before and after another ingestion, which may have sorted the questions otherwise."""
    before = [result("base", n, 1, category="law" if n < 8 else None) for n in range(12)]
    after = [result("adapter", n, 1, category="law" if n < 4 else "news") for n in range(12)]
    found = breakdown.categories({"base": before, "adapter": after}, 100)
    assert [(category.name, category.questions) for category in found] == [("news", 8), ("law", 4)]
    assert [category.cells["hit_at_1", run].n for category in found for run in ("base", "adapter")] == [8, 8, 4, 4]


def test_beyond_the_largest_categories_the_others_stand_together() -> None:
    many = [result("base", n, 1, category=f"c{n % 30:02d}") for n in range(45)]
    found = breakdown.categories({"base": many}, 100)
    assert len(found) == breakdown.MOST_CATEGORIES + 1
    assert found[-1].name == "18 other categories"
    assert sum(category.questions for category in found) == 45


def test_cost_is_shared_among_all_found_and_right() -> None:
    spent = {"turns": 2, "prompt_tokens": 90, "completion_tokens": 10, "elapsed_s": 1.5, "searches": 1}
    made = rows("base", ["correct", "answered_wrong", "never_retrieved", "errored"], **spent)
    for row in made[2:]:
        row["searches_to_success"] = None
    found = {cost.name: (cost.a_question, cost.a_found, cost.a_right) for cost in breakdown.costs(made)}
    assert found["Prompt tokens"] == (90, 180, 360)
    assert found["Seconds"] == (1.5, 3, 6)
    assert found["Model calls"] == (2, 4, 8)
    nothing = breakdown.costs(rows("base", ["unparsable"], **spent | {"searches_to_success": None}))
    assert [(cost.a_found, cost.a_right) for cost in nothing] == [(None, None)] * 5
    assert breakdown.costs(rows("question", ["found"], turns=None)) == []


def test_what_a_server_did_not_tell_is_not_spent_for_nothing() -> None:
    spent = {"turns": 2, "prompt_tokens": 90, "elapsed_s": 1.5, "searches": 1}
    made = rows("base", ["correct", "correct"], **spent)  # none tells completion_tokens
    made[1]["prompt_tokens"] = None
    prompt, generated, seconds, *_ = breakdown.costs(made)
    assert {(c.a_question, c.a_found, c.a_right) for c in (prompt, generated)} == {(None, None, None)}
    assert seconds.a_question == 1.5
    assert "| Prompt tokens | – / – / – |" in breakdown.markdown({"base": made})


def test_as_text_ends_and_costs_stand_in_a_column_a_run() -> None:
    spent = {"turns": 2, "prompt_tokens": 1200, "completion_tokens": 10, "elapsed_s": 1.5}
    text = breakdown.markdown(
        {"question": rows("question", ["found", "never_retrieved"]), "base": rows("base", ["found"] * 2, **spent)}
    )
    assert "| found (no answer judged) | 1 (50.0 %) | 2 (100.0 %) |" in text
    assert "| never found | 1 (50.0 %) | 0 (0.0 %) |" in text
    assert "| Prompt tokens | 1,200 / 1,200 / – |" in text
    assert "correct" not in text


@pytest.mark.parametrize(("value", "shown"), [(None, "–"), (1234.6, "1,235"), (12.34, "12.3"), (0.456, "0.46")])
def test_amounts_read_well(value: float | None, shown: str) -> None:
    assert breakdown.show_cost(value) == shown
