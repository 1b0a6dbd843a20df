"""Metrics, intervals, the paired test and verdicts, on results whose truth is known."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tasks import bootstrap
from tasks.artifact import Artifact, read_rows, table_of, write_table
from tasks.compare import _verdict, compare, comparison_markdown, headline, headlines, sentence
from tasks.errors import InputError
from tasks.metrics import show_interval
from tasks.runs import Cell, metric_cells, metrics_markdown, read_runs, repeated, repeated_markdown
from tasks.schemas import TABLES

RESAMPLES = 1000
ranks = st.one_of(st.none(), st.integers(1, 10))


def result(run: str, number: int, rank: int | None, **others: Any) -> dict[str, Any]:
    """A results row of question `number`, two questions a document."""
    return {
        **dict.fromkeys(TABLES["results/4"].names),
        "run": run,
        "question_id": f"q{number:04d}",
        "question": f"Question {number}?",
        "answer_locations": [{"document": f"d{number // 2}.pdf", "page": 1}],
        "first_rank": rank,
        "first_ranks": [rank] if rank else [],
        "best_rank": rank,
        "best_known": True,
        "seen_ranks": [rank] if rank and rank <= 3 else [],
        "searches": 1,
        "searches_to_success": 1 if rank and rank <= 3 else None,
        "first_hit_rank": rank if rank and rank <= 3 else None,
        "zero_results": 0,
        **others,
    }


def stored(folder: Path, run: str, found: Sequence[int | None], **others: Any) -> Artifact:
    rows = [result(run, number, rank, **others) for number, rank in enumerate(found)]
    return write_table(table_of(rows, "results/4"), str(folder / f"{run}.parquet"), "results/4", {})


def cells_of(*results: Artifact) -> dict[tuple[str, str], Cell]:
    return {(c.metric, c.run): c for c in metric_cells(read_runs(results), RESAMPLES)}


def compared(folder: Path, *results: Artifact) -> list[dict[str, Any]]:
    return read_rows(compare(results, RESAMPLES, str(folder / "comparison.parquet")))


def hit_at_1(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return next(row for row in rows if row["metric"] == "hit_at_1")


def test_a_miss_counts_zero_and_only_the_reference_metric_leaves_it_out(tmp_path: Path) -> None:
    cells = cells_of(stored(tmp_path, "base", [1, 2, None, None]))
    assert cells["hit_at_1", "base"].mean == 0.25
    assert cells["hit_at_3", "base"].mean == 0.5
    assert cells["mrr_first", "base"].mean == 1.5 / 4
    assert cells["mrr_survivors", "base"].mean == 1.5 / 2
    assert cells["mrr_survivors", "base"].n == 2
    assert cells["success", "base"].mean == 0.5
    assert ("anls", "base") not in cells


def test_the_reference_metric_counts_no_page_that_only_a_later_search_found(tmp_path: Path) -> None:
    rows = [result("base", 0, 1), result("base", 1, 5, searches_to_success=2)]
    cells = cells_of(write_table(table_of(rows, "results/4"), str(tmp_path / "r.parquet"), "results/4", {}))
    assert (cells["mrr_survivors", "base"].n, cells["mrr_survivors", "base"].mean) == (1, 1)


def test_rates_are_of_searches_and_turns_not_of_questions(tmp_path: Path) -> None:
    rows = [
        result("base", 0, 1, searches=4, zero_results=1, turns=5, valid_turns=5),
        result("base", 1, None, searches=0, zero_results=0, turns=5, valid_turns=0),
    ]
    stored_rows = write_table(table_of(rows, "results/4"), str(tmp_path / "r.parquet"), "results/4", {})
    cells = cells_of(stored_rows)
    assert cells["zero_results", "base"].mean == 0.25
    assert cells["valid_turns", "base"].mean == 0.5


def test_what_is_counted_and_not_estimated_has_no_interval(tmp_path: Path) -> None:
    cells = cells_of(stored(tmp_path, "base", [1, None] * 10, outcome="answered"))
    assert (cells["failed", "base"].mean, cells["failed", "base"].low) == (0, None)
    assert cells["hit_at_1", "base"].low is not None


@given(st.lists(st.tuples(ranks, ranks), min_size=4, max_size=40))
@settings(max_examples=30, deadline=None)
def test_comparing_either_way_round_says_the_same(tmp_path_factory: pytest.TempPathFactory, pairs: list[Any]) -> None:
    folder = tmp_path_factory.mktemp("symmetry")
    one, other = (stored(folder, name, found) for name, found in zip("ab", zip(*pairs, strict=True), strict=True))
    forward, backward = compared(folder, one, other), compared(folder, other, one)
    opposite = {"improved": "worse", "worse": "improved", "cannot tell": "cannot tell"}
    for ours, theirs in zip(forward, backward, strict=True):
        assert ours["difference"] == pytest.approx(-theirs["difference"])
        assert ours["p_value"] == theirs["p_value"]
        assert (ours["low"], ours["high"]) == pytest.approx((-theirs["high"], -theirs["low"]))
        assert ours["verdict"] == opposite[theirs["verdict"]]
        assert ours["low"] <= ours["difference"] + 1e-9
        assert ours["difference"] <= ours["high"] + 1e-9


@given(st.lists(ranks, min_size=4, max_size=40))
@settings(max_examples=20, deadline=None)
def test_a_run_never_differs_from_itself(tmp_path_factory: pytest.TempPathFactory, found: list[int | None]) -> None:
    folder = tmp_path_factory.mktemp("self")
    for row in compared(folder, stored(folder, "a", found), stored(folder, "b", found)):
        assert (row["difference"], row["p_value"], row["verdict"]) == (0, 1, "cannot tell")
        assert row["smallest_visible"] > 0
        assert row["low"] < 0 < row["high"]


def test_a_clear_gain_a_clear_loss_and_too_few_questions(tmp_path: Path) -> None:
    bad: list[int | None] = [None, None, None, 1] * 30
    good: list[int | None] = [1, 1, None, 1] * 30
    base, adapter = stored(tmp_path, "base", bad), stored(tmp_path, "adapter", good)
    gain = hit_at_1(compared(tmp_path, base, adapter))
    assert (gain["verdict"], gain["n"], gain["groups"], gain["difference"]) == ("improved", 120, 60, 0.5)
    assert sentence(gain).endswith("n = 120: improved")
    assert hit_at_1(compared(tmp_path, adapter, base))["verdict"] == "worse"
    few = hit_at_1(compared(tmp_path, stored(tmp_path, "base", bad[:8]), stored(tmp_path, "adapter", good[:8])))
    assert few["verdict"] == "cannot tell"
    assert "cannot tell, n = 8 too small to see less than" in sentence(few)


def test_one_document_has_no_interval_and_no_verdict(tmp_path: Path) -> None:
    row = hit_at_1(compared(tmp_path, stored(tmp_path, "a", [None, None]), stored(tmp_path, "b", [1, 1])))
    assert (row["groups"], row["low"], row["high"], row["verdict"]) == (1, None, None, "cannot tell")
    assert "+100.0 points, p = 1.0000, n = 2: cannot tell, n = 2 from one group of documents" in sentence(row)
    assert comparison_markdown([row]).count("no difference of any size") == 1
    assert "| – | 1.0000 | cannot tell |" in comparison_markdown([row])


def test_five_groups_that_all_gain_are_too_few_for_a_verdict(tmp_path: Path) -> None:
    five, six = (
        hit_at_1(compared(tmp_path, stored(tmp_path, "a", [None] * 2 * n), stored(tmp_path, "b", [1] * 2 * n)))
        for n in (5, 6)
    )
    assert (five["p_value"], five["low"] > 0, five["verdict"]) == (2 / 2**5, True, "cannot tell")
    assert (six["p_value"], six["verdict"]) == (2 / 2**6, "improved")


@pytest.mark.parametrize(
    ("low", "high", "p", "verdict"),
    [
        (0.1, 0.2, 0.04, "improved"),
        (-0.2, -0.1, 0.04, "worse"),
        (0.1, 0.2, 0.05, "cannot tell"),
        (-0.1, 0.2, 0.01, "cannot tell"),
        (0.0, 0.2, 0.01, "cannot tell"),
    ],
)
def test_a_verdict_needs_the_interval_and_the_test(low: float, high: float, p: float, verdict: str) -> None:
    assert _verdict(low, high, p) == verdict


def test_of_random_swaps_p_is_never_0(tmp_path: Path) -> None:
    base, run = stored(tmp_path, "a", [None] * 120), stored(tmp_path, "b", [1] * 120)
    assert hit_at_1(compared(tmp_path, base, run))["p_value"] == 1 / (RESAMPLES + 1)


def test_a_run_that_is_always_right_still_has_an_interval(tmp_path: Path) -> None:
    cell = cells_of(stored(tmp_path, "base", [1] * 60))["hit_at_1", "base"]
    assert cell.mean == 1
    assert (cell.low, cell.high) == (pytest.approx(1 - bootstrap.never_seen(30)), 1)


def test_other_questions_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"only in 'a': 1 \(q0002\)"):
        compared(tmp_path, stored(tmp_path, "a", [1, 2, 3]), stored(tmp_path, "b", [1, 2]))


@pytest.mark.parametrize(
    "changed", [{"question": "Why?"}, {"answers": [["x"]]}, {"answer_locations": [{"document": "z.pdf", "page": 9}]}]
)
def test_a_question_that_was_ingested_anew_is_another(tmp_path: Path, changed: dict[str, Any]) -> None:
    base, rows = stored(tmp_path, "a", [1, 2]), [result("b", 0, 1), result("b", 1, 2) | changed]
    run = write_table(table_of(rows, "results/4"), str(tmp_path / "b.parquet"), "results/4", {})
    with pytest.raises(InputError, match="evaluate both again"):
        compared(tmp_path, base, run)


def test_runs_of_the_same_name_no_runs_and_repeated_questions_are_refused(tmp_path: Path) -> None:
    run = stored(tmp_path, "a", [1, 2])
    with pytest.raises(InputError, match="same name"):
        compared(tmp_path, run, run)
    with pytest.raises(InputError, match="no results"):
        compared(tmp_path)
    twice = table_of([result("b", 0, 1), result("b", 0, 2)], "results/4")
    with pytest.raises(InputError, match="more than once"):
        compared(tmp_path, write_table(twice, str(tmp_path / "b.parquet"), "results/4", {}))


@pytest.mark.parametrize(
    ("found", "rare"), [(0, False), (1, True), (5, True), (6, False), (14, False), (15, True), (19, True), (20, False)]
)
def test_an_interval_of_what_few_groups_have_is_marked_as_likely_too_narrow(
    tmp_path: Path, found: int, rare: bool
) -> None:
    """Resampling never draws what so few groups might have had; none and all have an interval of their own."""
    cells = cells_of(stored(tmp_path, "base", [1 if number // 2 < found else None for number in range(40)]))
    assert cells["hit_at_1", "base"].rare == rare
    assert ("]† |" in metrics_markdown(list(cells.values()))) == rare


def test_every_later_run_is_compared_with_every_earlier_and_the_headline_is_the_last_pair(tmp_path: Path) -> None:
    results = [stored(tmp_path, name, [rank] * 8) for name, rank in (("question", 2), ("base", None), ("adapter", 1))]
    rows = compared(tmp_path, *results)
    pairs = list(dict.fromkeys((row["run"], row["baseline"]) for row in rows))
    assert pairs == [("base", "question"), ("adapter", "question"), ("adapter", "base")]
    first = headline(rows)
    assert first is not None
    assert (first["run"], first["baseline"], first["metric"]) == ("adapter", "base", "hit_at_1")
    assert [(row["run"], row["baseline"]) for row in headlines(rows)] == [("adapter", "base"), ("adapter", "question")]
    table = comparison_markdown(rows)
    assert "| adapter − base | Hit@1 | +100.0 |" in table
    assert "excludes 0 and p is below 0.05" in table
    assert "n = 8 questions in 4 groups" in table
    assert "mrr_survivors" not in table
    assert "| Hit@1 |" in metrics_markdown(metric_cells(read_runs(results), RESAMPLES))


def test_what_says_the_same_of_every_run_is_left_out_of_tables(tmp_path: Path) -> None:
    def cells(*rows: dict[str, Any]) -> list[Cell]:
        made = write_table(table_of(rows, "results/4"), str(tmp_path / "r.parquet"), "results/4", {})
        return metric_cells(read_runs([made]), RESAMPLES)

    alike = [result("base", n, rank) for n, rank in enumerate([1, None, 4, 2])]
    assert {"mrr_best", "best_hit_at_1", "best_hit_at_10"} <= repeated(cells(*alike))
    again = {"searches": 2, "best_rank": 1}
    assert repeated(cells(*alike[:3], alike[3] | again)).isdisjoint({"mrr_best", "best_hit_at_1"})
    assert "MRR, best search" in repeated_markdown({"mrr_best"})
    assert repeated_markdown(()) == ""


def test_comparing_again_gives_the_same_bytes(tmp_path: Path) -> None:
    results = [stored(tmp_path, name, [1, None, 3, 2] * 5) for name in "ab"]
    hashes = {compare(results, RESAMPLES, str(tmp_path / f"{n}.parquet")).sha256 for n in range(2)}
    assert len(hashes) == 1


def test_intervals_read_well() -> None:
    assert show_interval("hit_at_1", -0.1, 0.261, signed=True) == "[−10.0, +26.1]"
    assert show_interval("hit_at_1", None, None) == ""
    assert show_interval("calls", 1.234, 2.341) == "[1.23, 2.34]"
    assert show_interval("prompt_tokens", 90.4, 120.4) == "[90, 120]"


def test_groups_join_over_shared_documents() -> None:
    places = [["a"], ["b"], ["a", "c"], ["d"], ["c", "e"], [], []]
    questions = [{"answer_locations": [{"document": d, "page": 1} for d in documents]} for documents in places]
    groups = bootstrap.document_groups(questions)
    assert groups[0] == groups[2] == groups[4]
    assert len(set(groups.tolist())) == 5


def _simulated(rng: np.random.Generator, groups: int) -> tuple[bootstrap.Floats, float]:
    """Sums a group of two runs whose true difference is known; questions of a document are alike, documents uneven."""
    group = np.repeat(np.arange(groups), 1 + rng.geometric(0.2, groups))
    shared, gain = rng.normal(size=groups)[group], 0.5 * rng.normal(size=groups)[group]
    noise = rng.normal(size=(2, len(group)))
    base = 0.6 * shared + 0.8 * noise[0] < -0.3
    run = 0.6 * shared + 0.8 * noise[1] + gain < 0
    ones = np.ones(len(group))
    sums = bootstrap.group_sums(np.stack([run, ones, base, ones], axis=1).astype(float), group)
    return sums, 0.5 - float(stats.norm.cdf(-0.3))


@pytest.mark.parametrize(("groups", "tail"), [(5, 0.0010), (10, 0.0086), (20, 0.0159), (10_000, 0.025)])
def test_percentiles_are_widened_for_few_groups(groups: int, tail: float) -> None:
    """As Hesterberg, 2015, section 5.3, widens them."""
    low, high = bootstrap.interval(np.linspace(0, 1, 100_001), groups) or (0, 0)
    assert (low, high) == pytest.approx((tail, 1 - tail), abs=1e-4)


@pytest.mark.parametrize("groups", [12, 40])
def test_intervals_cover_the_truth_about_95_times_in_100(groups: int) -> None:
    rng, covered, rounds = np.random.default_rng(7), 0, 400
    for _ in range(rounds):
        sums, truth = _simulated(rng, groups)
        totals = bootstrap.resampled_totals(sums, 500)
        found = bootstrap.interval(totals[:, 0] / totals[:, 1] - totals[:, 2] / totals[:, 3], groups)
        assert found is not None
        covered += found[0] <= truth <= found[1]
    assert 0.91 <= covered / rounds <= 0.985


@pytest.mark.parametrize("groups", [8, 30])  # all swaps, and a random part of them
def test_the_test_errs_no_more_than_5_times_in_100(groups: int) -> None:
    rng, wrong, rounds = np.random.default_rng(11), 0, 400
    for _ in range(rounds):
        sums, _ = _simulated(rng, groups)
        swap = rng.integers(2, size=(groups, 1)).astype(bool)  # which makes the two runs alike
        run, base = np.where(swap, sums[:, :2], sums[:, 2:]), np.where(swap, sums[:, 2:], sums[:, :2])
        wrong += bootstrap.swap_p_values((run[:, :1], run[:, 1:]), (base[:, :1], base[:, 1:]), 500)[0] < 0.05
    assert wrong / rounds <= 0.08


def test_the_smallest_visible_difference_is_seen_four_times_in_five() -> None:
    rng, groups, rounds = np.random.default_rng(3), 40, 200
    effect = 0.14
    seen, promised = 0, []
    for _ in range(rounds):
        difference = effect + 0.3 * rng.normal(size=(groups, 1))
        ones, zeros = np.ones((groups, 1)), np.zeros((groups, 1))
        totals = bootstrap.resampled_totals(np.hstack([difference, ones]), 500)
        promised.append(bootstrap.smallest_visible(totals[:, 0] / totals[:, 1], groups))
        seen += bootstrap.swap_p_values((difference, ones), (zeros, ones), 500)[0] < 0.05
    assert np.mean(promised) == pytest.approx(effect, rel=0.1)
    assert 0.72 <= seen / rounds <= 0.9
