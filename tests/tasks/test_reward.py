"""The reward: bounds, monotony and the cases that are known by hand."""

import math
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import settings as tune
from hypothesis import strategies as st

from tasks import reward
from tasks.config import RewardName

quick = tune(max_examples=60, deadline=None)
pages = st.tuples(st.sampled_from(["a.pdf", "b.pdf", "c.pdf"]), st.integers(1, 4))
depths = st.integers(1, 20)


@st.composite
def searches(draw: st.DrawFn) -> tuple[list[int | None], int]:
    """Ranks of a rollout's searches, and the k that they were cut at."""
    k = draw(depths)
    return draw(st.lists(st.none() | st.integers(1, k), max_size=8)), k


@quick
@given(st.lists(pages, unique=True, max_size=12), st.lists(pages, max_size=4))
def test_rank_is_that_of_the_best_ranked_answer_location(results, locations):
    rank = reward.gt_rank(results, locations)
    each = [results.index(place) + 1 for place in locations if place in results]
    assert rank == min(each, default=None)


@quick
@given(st.lists(pages, unique=True, min_size=1, max_size=12), st.lists(pages, max_size=4), pages)
def test_another_answer_location_never_lowers_the_rank(results, locations, further):
    before, after = reward.gt_rank(results, locations), reward.gt_rank(results, [*locations, further])
    assert after is not None if before is not None else True
    assert (after or 99) <= (before or 99)


@quick
@given(depths, st.integers(1, 40))
def test_rank_score_falls_with_the_rank_and_stays_within_0_and_1(k, rank):
    score, next_score = reward.rank_score(rank, k), reward.rank_score(rank + 1, k)
    assert 0 <= next_score <= score <= 1
    assert next_score < score or rank > k
    assert (score > 0) == (rank <= k)
    assert reward.rank_score(1, k) == 1
    assert reward.rank_score(None, k) == 0


@quick
@given(searches())
def test_effort_lies_between_0_and_1_and_is_0_only_for_a_miss(found):
    ranks, k = found
    effort = reward.effort_score(ranks, k)
    assert 0 <= effort <= 1
    assert (effort > 0) == (reward.first_success(ranks) is not None)


@quick
@given(depths)
def test_effort_of_a_first_rank_by_a_single_search_is_1(k):
    assert reward.effort_score([1], k) == 1


@quick
@given(searches())
def test_a_miss_before_the_hit_costs_effort(found):
    ranks, k = found
    if reward.first_success(ranks) is not None:
        assert reward.effort_score([None, *ranks], k) <= reward.effort_score(ranks, k)


@quick
@given(searches(), searches())
def test_what_comes_after_the_hit_changes_no_effort(found, later):
    (ranks, k), (more, _) = found, later
    if reward.first_success(ranks) is not None:
        assert reward.effort_score([*ranks, *more], k) == reward.effort_score(ranks, k)


@quick
@given(searches(), st.integers(1, 20))
def test_a_worse_first_rank_costs_effort(found, rank):
    ranks, k = found
    rank = min(rank, k)
    better = reward.effort_score([rank, *ranks], k)
    worse = reward.effort_score([rank + 1 if rank < k else None, *ranks], k)
    assert worse < better


@quick
@given(searches())
def test_best_search_is_the_earliest_of_the_best_rank(found):
    ranks, k = found
    best = reward.best_search([reward.rank_score(rank, k) for rank in ranks])
    hits = [rank for rank in ranks if rank is not None]
    assert best == (ranks.index(min(hits)) if hits else None)
    first = reward.first_success(ranks)
    assert (first is None) == (best is None)
    if best is not None:
        assert first <= best + 1


rewards = pytest.mark.parametrize("name", get_args(RewardName))


@rewards
@quick
@given(results=st.lists(pages, unique=True, max_size=12), wanted=st.sets(pages, max_size=4), k=depths)
def test_every_reward_lies_between_0_and_1_and_is_0_only_for_a_miss(name, results, wanted, k):
    score = reward.score(name, results, wanted, k)
    assert 0 <= score <= 1
    assert (score > 0) == (not wanted.isdisjoint(results[:k]))
    assert reward.score(name, [*sorted(wanted), *results], wanted, len(wanted) or 1) == pytest.approx(
        float(bool(wanted))
    )


@rewards
@quick
@given(
    results=st.lists(pages, unique=True, min_size=2, max_size=12),
    wanted=st.sets(pages, min_size=1, max_size=4),
    k=depths,
    data=st.data(),
)
def test_an_answer_location_that_comes_earlier_never_lowers_a_reward(name, results, wanted, k, data):
    at = data.draw(st.integers(1, len(results) - 1))
    moved = [*results[: at - 1], results[at], results[at - 1], *results[at + 1 :]]
    before, after = (reward.score(name, pages_, wanted, k) for pages_ in (results, moved))
    if results[at] in wanted:
        assert after >= before
    if results[at - 1] in wanted:
        assert after <= before
    first = next((n for n, page in enumerate(results, 1) if page in wanted), None)
    if name == "linear":
        assert before == reward.rank_score(first, k)


def test_only_ndcg_counts_every_answer_location():
    wanted = [("a.pdf", 1), ("b.pdf", 2)]
    one, both = [wanted[0], ("c.pdf", 1)], wanted
    scores = {name: [reward.score(name, results, wanted, 3) for results in (one, both)] for name in reward.REWARDS}
    assert scores["linear"] == scores["reciprocal"] == [1, 1]
    assert scores["ndcg"] == [pytest.approx(0.6131, abs=1e-4), 1]


@pytest.mark.parametrize(
    ("ranks", "k", "effort"),
    [([], 3, 0.0), ([None, None], 3, 0.0), ([3], 3, 3 / 5), ([None, 1], 2, 0.5), ([2, 1], 3, 3 / 4)],
)
def test_effort_by_hand(ranks, k, effort):
    assert reward.effort_score(ranks, k) == pytest.approx(effort)


@quick
@given(st.none() | st.integers(1, 50), depths)
def test_a_hit_counts_1_and_a_miss_0(rank, k):
    assert reward.hit_at(rank, k) == (1.0 if reward.rank_score(rank, k) > 0 else 0.0)
    assert 0 <= reward.reciprocal_rank(rank) <= 1


@quick
@given(st.sets(pages), st.sets(pages))
def test_citation_f1_is_the_harmonic_mean_and_symmetric(predicted, wanted):
    precision, recall, f1 = reward.set_f1(predicted, wanted)
    assert (recall, precision, f1) == reward.set_f1(wanted, predicted)
    assert min(precision, recall) - 1e-9 <= f1 <= max(precision, recall) + 1e-9
    assert reward.set_f1(wanted, wanted) == ((1.0, 1.0, 1.0) if wanted else (0.0, 0.0, 0.0))


locations = st.lists(pages, unique=True, min_size=1, max_size=6)


@quick
@given(st.lists(pages, max_size=12), locations, depths)
def test_recall_and_ndcg_lie_between_0_and_1_and_ndcg_is_1_only_when_no_order_is_better(results, wanted, k):
    ranks = reward.gt_ranks(results, wanted)
    assert ranks == sorted({results.index(page) + 1 for page in wanted if page in results})
    recall, ndcg = reward.recall_at(ranks, len(wanted), k), reward.ndcg_at(ranks, len(wanted), k)
    assert 0 <= recall <= 1
    assert 0 <= ndcg <= 1
    assert (recall > 0) == (ndcg > 0) == (reward.hit_at(ranks[0] if ranks else None, k) == 1)
    on_top = min(k, len(wanted))
    assert (ndcg == 1) == (ranks[:on_top] == list(range(1, on_top + 1)))
    assert reward.recall_at(ranks, len(wanted), k + 1) >= recall


@quick
@given(st.lists(pages, unique=True, max_size=12), pages, depths)
def test_with_one_answer_location_recall_is_the_hit_and_ndcg_depends_on_its_rank(results, wanted, k):
    rank, ranks = reward.gt_rank(results, [wanted]), reward.gt_ranks(results, [wanted])
    assert reward.recall_at(ranks, 1, k) == reward.hit_at(rank, k)
    assert reward.ndcg_at(ranks, 1, 1) == reward.hit_at(rank, 1)
    assert reward.ndcg_at(ranks, 1, k) == pytest.approx(1 / math.log2(1 + rank) if rank and rank <= k else 0)
    assert reward.ndcg_at(ranks, 1, 2) >= reward.hit_at(rank, 2) * reward.reciprocal_rank(rank)


@quick
@given(st.lists(pages, min_size=2, max_size=12, unique=True), locations, st.integers(0, 10))
def test_a_page_with_the_answer_that_moves_up_never_costs(results, wanted, at):
    at = at % (len(results) - 1)
    better, worse = list(results), list(results)
    if results[at + 1] in wanted and results[at] not in wanted:
        better[at], better[at + 1] = results[at + 1], results[at]
    ours, theirs = (reward.gt_ranks(order, wanted) for order in (better, worse))
    k = len(results)
    gained = reward.ndcg_at(ours, len(wanted), k) - reward.ndcg_at(theirs, len(wanted), k)
    assert gained > 0 if better != worse else gained == 0


@quick
@given(st.lists(st.lists(pages, max_size=4), max_size=4))
def test_several_searches_show_each_page_once_and_in_the_order_of_its_first_showing(made):
    shown = reward.in_order_seen(made)
    everything = [page for results in made for page in results]
    assert len(shown) == len(set(shown)) == len(set(everything))
    assert [everything.index(page) for page in shown] == sorted(everything.index(page) for page in shown)
    if len(made) == 1:
        assert reward.gt_ranks(shown, shown[:2]) == list(range(1, len(shown[:2]) + 1))
