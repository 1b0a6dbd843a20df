"""Scoring: real searches in a real index, from rollouts that found, missed, failed and never searched."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks import config
from tasks.agent.trajectory import cited
from tasks.artifact import Artifact, provenance, read_provenance, read_rows, table_of, write_table
from tasks.compare import compare
from tasks.errors import ArtifactError, InputError
from tasks.evaluate import rescore, score, score_question_baseline
from tasks.metrics import HIT_DEPTHS, METRICS
from tasks.runs import metric_cells, read_runs
from tasks.schemas import TABLES
from tasks.search.index import Searcher, build_index, open_index

TOP_K = 3
EVALUATE = config.Evaluate()
SUBJECTS = ("pumps", "valves", "filters", "seals", "motors", "sensors", "cables", "bearings")


def row_of(schema: str, **values: Any) -> dict[str, Any]:
    return {**dict.fromkeys(TABLES[schema].names), **values}


def question(number: int, text: str | None = None, **others: Any) -> dict[str, Any]:
    """Question `number` is answered on page `number` + 1 of the only document."""
    return {
        "question_id": f"q{number}",
        "question": text or f"What is the service interval of {SUBJECTS[number]}?",
        "answers": [["12 months"], ["one year"]],
        "answer_locations": [{"document": "manual.pdf", "page": number + 1}],
        "category": "text",
        "split": "test",
        **others,
    }


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return index_of(tmp_path_factory.mktemp("index"), SUBJECTS)


def index_of(folder: Path, subjects: Sequence[str]) -> Artifact:
    pages = [
        row_of(
            "pages/2",
            file="manual.pdf",
            page_number=number + 1,
            total_pages=len(subjects),
            title="Service manual",
            # "service" is on every page, and the more often the lower the page number: one word ranks all pages
            text=f"{subject} interval " + "service " * (len(subjects) - number) + "other words " * 2 * number,
            text_source="pdf",
        )
        for number, subject in enumerate(subjects)
    ]
    written = write_table(table_of(pages, "pages/2"), str(folder / "pages.parquet"), "pages/2", {})
    return build_index(written, config.Index(), str(folder / "index"))


@pytest.fixture(scope="module")
def searcher(index: Artifact) -> Searcher:
    return open_index(index, config.Search())


def turn(searcher: Searcher, asked: dict[str, Any], *queries: str, failure: str | None = None) -> dict[str, Any]:
    """A turn whose searches are really made, as the agent makes them: to the top 3."""
    searches = []
    for query in queries:
        found = searcher.search(query, TOP_K, asked["question"])
        wanted = {(place["document"], place["page"]) for place in asked["answer_locations"]}
        ranks = [hit.rank for hit in found.hits if (hit.file, hit.page_number) in wanted]
        results = [{"rank": h.rank, "file": h.file, "page_number": h.page_number, "score": h.score} for h in found.hits]
        searches.append(
            {
                "query": query,
                "searched": found.searched,
                "read_as": found.read_as,
                "results": results,
                "gt_rank": min(ranks, default=None),
                "rank_score": 0.0,
                "shown": True,
            }
        )
    return {
        **{"turn": 1, "raw_text": "", "reasoning": None, "action": "search", "searches": searches, "failure": failure},
        **{
            "failure_detail": None,
            "finish_reason": "stop",
            "prompt_tokens": 9,
            "completion_tokens": 5,
            "latency_s": 0.1,
        },
    }


def rollout(asked: dict[str, Any], *turns: dict[str, Any], **others: Any) -> dict[str, Any]:
    return row_of(
        "trajectories/2",
        **{
            **asked,
            "rollout_id": f"r-{asked['question_id']}",
            "status": "finished",
            "outcome": "out_of_turns",
            "top_k": TOP_K,
            "turns": list(turns),
            "prompt_tokens": 9,
            "completion_tokens": 5,
            "elapsed_s": 0.1,
            **others,
            "citations": cited([(c["file"], c["page"]) for c in others.get("citations", ())], turns, 0),
        },
    )


def scored(
    folder: Path,
    searcher: Searcher,
    rows: Sequence[dict[str, Any]],
    run: str = "base",
    *,
    answer: bool = True,
) -> Artifact:
    facts = provenance(model="tiny", settings={"agent": config.Agent(answer=answer).model_dump(mode="json")})
    stored = write_table(table_of(rows, "trajectories/2"), str(folder / f"t-{run}.parquet"), "trajectories/2", facts)
    return score(stored, searcher, EVALUATE, run, str(folder / f"{run}.parquet"))


def test_searches_are_ranked_deeper_than_the_agent_was_shown(tmp_path: Path, searcher: Searcher) -> None:
    asked = question(5)
    (row,) = read_rows(scored(tmp_path, searcher, [rollout(asked, turn(searcher, asked, "service", "zebra"))]))
    assert row["first_rank"] == 6
    assert (row["best_rank"], row["best_known"]) == (6, True)
    assert row["searches_to_success"] is None  # the agent saw three pages
    assert (row["searches"], row["zero_results"]) == (2, 1)


def test_best_and_first_search_of_a_rollout(tmp_path: Path, searcher: Searcher) -> None:
    asked = question(6)
    turns = [turn(searcher, asked, "service"), turn(searcher, asked, "cables"), turn(searcher, asked, "zebra")]
    (row,) = read_rows(scored(tmp_path, searcher, [rollout(asked, *turns)]))
    assert (row["first_query"], row["first_rank"], row["best_rank"]) == ("service", 7, 1)
    assert (row["searches"], row["searches_to_success"], row["turns"], row["valid_turns"]) == (3, 2, 3, 3)
    assert row["first_hit_rank"] == turns[1]["searches"][0]["gt_rank"] == 1
    assert row["calls_to_success"] == 2
    measured = {metric.name: metric.parts(row) for metric in METRICS}
    assert [measured[f"hit_at_{k}"] for k in HIT_DEPTHS] == [(0, 1), (0, 1), (0, 1), (1, 1)]
    assert [measured[f"best_hit_at_{k}"] for k in HIT_DEPTHS] == [(1, 1)] * 4


def test_failed_and_silent_rollouts_are_misses_and_still_rows(tmp_path: Path, searcher: Searcher) -> None:
    first, second, third = question(0), question(1), question(2)
    rows = [
        rollout(first, turn(searcher, first, "pumps"), status="failed", outcome="deadline", failure_detail="too slow"),
        rollout(second, turn(searcher, second, failure="no_action")),
        rollout(third, turn(searcher, third, "filters")),
    ]
    results = scored(tmp_path, searcher, rows)
    failed, silent, found = read_rows(results)
    assert (failed["first_rank"], failed["searches"], failed["outcome"]) == (None, 0, "deadline")
    assert (silent["first_rank"], silent["first_query"], silent["valid_turns"]) == (None, None, 0)
    assert found["first_rank"] == 1
    cells = {cell.metric: cell for cell in metric_cells(read_runs([results]), 100)}
    assert cells["hit_at_1"].mean == pytest.approx(1 / 3)
    assert cells["hit_at_1"].n == 3
    assert cells["failed"].mean == pytest.approx(1 / 3)
    assert cells["mrr_survivors"].mean == 1
    assert read_provenance(results)["rollouts"]["model"] == "tiny"


def test_answers_and_citations(tmp_path: Path, searcher: Searcher) -> None:
    right = [{"file": "manual.pdf", "page": 1}]
    wrong = [{"file": "manual.pdf", "page": 2}, {"file": "other.pdf", "page": 9}]
    asked = [question(n) for n in range(3)]
    rows = [
        rollout(asked[0], outcome="answered", answer=["One  year"], citations=right),
        rollout(asked[1], outcome="answered", answer=["12 months", "or so"], citations=[*wrong, *wrong]),
        rollout(asked[2]),
    ]
    one, two, none = read_rows(scored(tmp_path, searcher, rows))
    assert (one["anls"], one["page_f1"], one["document_f1"]) == (1, 1, 1)
    assert two["anls"] == 0.5  # one of two items is right
    assert (two["page_precision"], two["page_recall"]) == (0.5, 1)
    assert (two["document_precision"], two["document_recall"]) == (0.5, 1)
    assert (none["anls"], none["page_f1"]) == (0, 0)  # the run answers, this question it did not


def test_a_citation_of_a_page_that_no_search_returned_is_made_up(tmp_path: Path, searcher: Searcher) -> None:
    asked = [question(0), question(1)]
    three = [{"file": "manual.pdf", "page": page} for page in (1, 7, 7)]
    unseen = turn(searcher, asked[0], "pumps")
    rows = [
        rollout(
            asked[0], unseen, turn(searcher, asked[0], "cables"), outcome="answered", answer=["x"], citations=three
        ),
        rollout(asked[1], turn(searcher, asked[1], "zebra"), outcome="answered", answer=["x"], citations=three),
    ]
    results = scored(tmp_path, searcher, rows)
    seen, invented = read_rows(results)
    assert (seen["cited"], seen["cited_seen"], seen["page_precision"]) == (2, 2, 0.5)
    assert (invented["cited"], invented["cited_seen"]) == (2, 0)
    cells = {cell.metric: cell.mean for cell in metric_cells(read_runs([results]), 100)}
    assert (cells["cited_seen"], cells["fabricated"]) == (0.5, 1.0)


def test_whether_a_citation_was_seen_is_not_counted_where_nobody_knows(tmp_path: Path, searcher: Searcher) -> None:
    made = rollout(question(0), turn(searcher, question(0), "pumps"), outcome="answered", answer=["x"])
    made["citations"] = [{"file": "manual.pdf", "page": page, "seen": seen} for page, seen in ((1, None), (2, True))]
    (row,) = read_rows(scored(tmp_path, searcher, [made]))
    assert (row["cited"], row["cited_seen"]) == (2, None)


def test_several_answer_locations_count_all_in_the_first_search_and_in_all(tmp_path: Path, searcher: Searcher) -> None:
    places = [{"document": "manual.pdf", "page": page} for page in (1, 6, 8)]
    asked = question(0, answer_locations=[*places, places[0]])
    turns = [turn(searcher, asked, "service"), turn(searcher, asked, "sensors"), turn(searcher, asked, "zebra")]
    results = scored(tmp_path, searcher, [rollout(asked, *turns)])
    (row,) = read_rows(results)
    assert (row["first_rank"], row["first_ranks"]) == (1, [1, 6, 8])
    assert row["seen_ranks"] == [1, 4]  # pages 1 to 3, then 6: what the agent was shown
    cells = {cell.metric: cell.mean for cell in metric_cells(read_runs([results]), 100)}
    assert [cells[f"recall_at_{k}"] for k in (3, 5, 10)] == pytest.approx([1 / 3, 1 / 3, 1])
    assert cells["recall_seen"] == pytest.approx(2 / 3)
    ideal = 1 + 1 / math.log2(3) + 1 / 2
    assert cells["ndcg_at_10"] == pytest.approx((1 + 1 / math.log2(7) + 1 / math.log2(9)) / ideal)
    assert cells["ndcg_seen"] == pytest.approx((1 + 1 / math.log2(5)) / ideal)


def test_how_each_question_ended(tmp_path: Path, searcher: Searcher) -> None:
    right = [{"file": "manual.pdf", "page": 1}]
    asked = [question(0, question_id=name) for name in "abcdefgh"]
    found = turn(searcher, asked[0], "pumps")
    rows = [
        rollout(asked[0], found, outcome="answered", answer=["12 months"]),
        rollout(asked[1], found, outcome="answered", answer=["never"], citations=right),
        rollout(asked[2], found, outcome="answered", answer=["never"]),
        rollout(asked[3], found, turn(searcher, asked[3], failure="not_an_answer")),
        rollout(asked[4], turn(searcher, asked[4], "cables"), outcome="answered", answer=["never"], citations=right),
        rollout(asked[5], turn(searcher, asked[5], failure="no_action")),
        rollout(asked[6], found, status="failed", outcome="deadline"),
        rollout(asked[7], turn(searcher, asked[7], failure="not_an_answer")),  # a search, where none was allowed
    ]
    assert [row["fate"] for row in read_rows(scored(tmp_path, searcher, rows))] == [
        *("correct", "answered_wrong", "not_cited", "out_of_turns", "never_retrieved", "unparsable", "errored"),
        "never_retrieved",
    ]
    only_searching = [rollout(asked[0], found, outcome="searched"), rollout(asked[1], outcome="searched")]
    only_searching[1]["turns"] = [turn(searcher, asked[1], "cables")]
    ended = read_rows(scored(tmp_path, searcher, only_searching, "base2", answer=False))
    assert [row["fate"] for row in ended] == ["found", "never_retrieved"]
    raw = baseline(tmp_path, searcher, [question(2, "Service?"), question(3, "Service?")])  # at rank 3 and 4
    assert [row["fate"] for row in read_rows(raw)] == ["found", "never_retrieved"]


@pytest.mark.parametrize(("outcome", "score"), [("searched", None), ("out_of_turns", 0)])
def test_no_answer_scores_0_unless_none_was_asked_for(
    tmp_path: Path, searcher: Searcher, outcome: str, score: float | None
) -> None:
    asked = question(0)
    made = rollout(asked, turn(searcher, asked, "pumps"), outcome=outcome)
    (row,) = read_rows(scored(tmp_path, searcher, [made], answer=outcome != "searched"))
    assert [row[name] for name in ("anls", "page_f1", "document_recall")] == [score] * 3


def test_rollouts_of_another_index_are_refused(tmp_path: Path, searcher: Searcher) -> None:
    asked = question(0)
    strange = turn(searcher, asked, "pumps")
    strange["searches"][0]["results"].insert(0, {"rank": 1, "file": "other.pdf", "page_number": 1, "score": 9.0})
    with pytest.raises(ArtifactError, match="search settings of the rollouts"):
        scored(tmp_path, searcher, [rollout(asked, strange)])


def test_results_say_by_which_search_and_index_they_were_ranked(tmp_path: Path, index: Artifact) -> None:
    """Or nobody could tell a baseline under OR from one under AND that found the same."""
    found = {}
    for operator in ("or", "and"):
        (folder := tmp_path / operator).mkdir()
        stored = baseline(folder, open_index(index, config.Search(operator=operator)), [question(0, "pumps")])
        found[operator] = read_provenance(stored)
    assert [kept["search"]["operator"] for kept in found.values()] == ["or", "and"]
    assert {kept["inputs"]["index"] for kept in found.values()} == {index.sha256}


def test_several_rollouts_of_a_question_and_none_are_refused(tmp_path: Path, searcher: Searcher) -> None:
    with pytest.raises(InputError, match="several rollouts"):
        scored(tmp_path, searcher, [rollout(question(0)), rollout(question(0))])
    with pytest.raises(InputError, match="no rollout"):
        scored(tmp_path, searcher, [])


def stored_questions(folder: Path, asked: Sequence[dict[str, Any]]) -> Artifact:
    rows = [{**row, "group": "manual.pdf"} for row in asked]
    return write_table(table_of(rows, "questions/1"), str(folder / "questions.parquet"), "questions/1", {})


def baseline(folder: Path, searcher: Searcher, asked: Sequence[dict[str, Any]], **settings: Any) -> Artifact:
    questions, chosen = stored_questions(folder, asked), EVALUATE.model_copy(update=settings)
    return score_question_baseline(questions, searcher, chosen, "question", str(folder / "q.parquet"), top_k=TOP_K)


def test_the_raw_question_is_the_query(tmp_path: Path, searcher: Searcher) -> None:
    asked = [question(0), question(5, "Service?"), question(7, split="train")]
    one, two = read_rows(baseline(tmp_path, searcher, asked))
    assert (one["first_rank"], one["searches"], one["searches_to_success"]) == (1, 1, 1)
    assert (two["first_rank"], two["searches_to_success"]) == (6, None)
    assert [(row["first_hit_rank"], row["calls_to_success"]) for row in (one, two)] == [(1, None), (None, None)]
    assert (two["best_rank"], two["best_known"], two["outcome"], two["anls"]) == (6, True, None, None)
    assert len(read_rows(baseline(tmp_path, searcher, asked, limit=1))) == 1
    with pytest.raises(InputError, match="no question is in split"):
        baseline(tmp_path, searcher, asked, split="dev")


@pytest.mark.parametrize(
    "text", ["NOT valves", "service AND zebra OR valves NOT valves", "file:valves", '"valves zebra"', "(valves"]
)
@pytest.mark.parametrize("operator", ["or", "and"])
def test_the_raw_question_is_no_query_syntax(tmp_path: Path, index: Artifact, text: str, operator: Any) -> None:
    """Operators in it would turn the page away; as words, each question ranks like its words."""
    opened = open_index(index, config.Search(operator=operator))
    words = "".join(c if c.isalnum() else " " for c in text).lower()
    (row,) = read_rows(baseline(tmp_path, opened, [question(1, text)]))
    expected = [hit.page_number for hit in opened.search(words, 10).hits]
    assert row["first_rank"] == (expected.index(2) + 1 if 2 in expected else None)
    assert row["first_query"] == text


@given(st.text(max_size=60))
@settings(max_examples=50, deadline=None)
def test_any_text_can_be_the_question(searcher: Searcher, tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    (row,) = read_rows(baseline(tmp_path_factory.mktemp("any"), searcher, [question(0, text or "x")]))
    assert row["first_rank"] is None or 1 <= row["first_rank"] <= 10


def test_first_queries_are_ranked_again_under_other_settings(
    tmp_path: Path, index: Artifact, searcher: Searcher
) -> None:
    asked = [question(0), question(6), question(2)]
    rows = [
        rollout(asked[0], turn(searcher, asked[0], "pumps zebra", "pumps")),
        rollout(asked[1], turn(searcher, asked[1], "service")),
        rollout(asked[2]),
    ]
    base = scored(tmp_path, searcher, rows)
    strict = open_index(index, config.Search(operator="and"))
    under_and = rescore(base, strict, EVALUATE, "base and", str(tmp_path / "and.parquet"))
    lost, same, silent = read_rows(under_and)
    assert (lost["first_rank"], lost["zero_results"], lost["first_query"]) == (None, 1, "pumps zebra")
    assert (same["first_rank"], same["best_known"], same["searches_to_success"]) == (7, False, None)
    assert [silent[n] for n in ("first_rank", "searches", "zero_results", "prompt_tokens")] == [None, 0, 0, None]
    expanded = open_index(index, config.Search(expand="question"))
    helped = read_rows(rescore(base, expanded, EVALUATE, "base + question", str(tmp_path / "more.parquet")))
    assert helped[1]["first_rank"] == 1  # "service" and the question's "cables"
    metrics = {row["metric"] for row in read_rows(compare([base, under_and], 100, str(tmp_path / "c.parquet")))}
    assert metrics == {"hit_at_1", "hit_at_3", "hit_at_5", "hit_at_10", "mrr_first", "recall_at_10", "ndcg_at_10"}


def test_the_raw_question_ranked_again_stays_plain_words(tmp_path: Path, index: Artifact, searcher: Searcher) -> None:
    base = baseline(tmp_path, searcher, [question(1, "NOT valves")])
    strict = open_index(index, config.Search(operator="and", expand="question"))
    (row,) = read_rows(rescore(base, strict, EVALUATE, "question and", str(tmp_path / "and.parquet")))
    assert row["first_rank"] is not None


def test_scoring_rollouts_made_with_the_question_added(tmp_path: Path, index: Artifact) -> None:
    opened = open_index(index, config.Search(operator="and", expand="question"))
    asked = question(4)
    (row,) = read_rows(scored(tmp_path, opened, [rollout(asked, turn(opened, asked, "service"))]))
    assert row["first_query"] == "service"
    assert row["first_rank"] == 1


def test_whether_answers_were_asked_for_is_told_by_the_settings_and_not_by_how_rollouts_ended(
    tmp_path: Path, searcher: Searcher
) -> None:
    ended = [("finished", "searched"), ("failed", "deadline"), ("finished", "out_of_context")]
    made = [
        rollout(question(n), turn(searcher, question(n), "pumps"), status=status, outcome=outcome)
        for n, (status, outcome) in enumerate(ended)
    ]
    rows = read_rows(scored(tmp_path, searcher, made, answer=False))
    assert {row["anls"] for row in rows} == {row["page_f1"] for row in rows} == {None}


def test_calls_count_turns_that_searched_for_nothing_and_not_searches(tmp_path: Path, searcher: Searcher) -> None:
    asked = question(6)
    wasted = {**turn(searcher, asked), "failure": "unparsable"}
    turns = [wasted, turn(searcher, asked, "service", "cables")]
    (row,) = read_rows(scored(tmp_path, searcher, [rollout(asked, *turns)]))
    assert (row["searches_to_success"], row["calls_to_success"]) == (2, 2)
    (row,) = read_rows(scored(tmp_path, searcher, [rollout(asked, wasted, wasted, turn(searcher, asked, "cables"))]))
    assert (row["searches_to_success"], row["calls_to_success"]) == (1, 3)
