"""Preference pairs: strict order, folding, the cap, and no dependence on order."""

import pytest
from hypothesis import given
from hypothesis import settings as tune
from hypothesis import strategies as st

from tasks import pairs, reward

quick = tune(max_examples=60, deadline=None)
_scores = st.sampled_from([0.0, 1 / 3, 2 / 3, 1.0])


@st.composite
def _candidate(draw: st.DrawFn) -> pairs.Candidate:
    words = draw(st.lists(st.sampled_from(["net", "sales", "2021", "Sales", "NET", "é"]), min_size=1, max_size=3))
    space = draw(st.sampled_from([" ", "  ", "\n"]))
    return pairs.Candidate(
        space.join(words),
        draw(st.none() | st.sampled_from(["so", "because"])),
        draw(_scores),
        frozenset([draw(st.sampled_from("rstu"))]),
    )


searches = st.lists(_candidate(), max_size=14)


def _folded(found):
    candidates: dict[str, pairs.Candidate] = {}
    pairs.add(candidates, found)
    return candidates


@quick
@given(searches, st.integers(0, 20))
def test_chosen_is_strictly_better_and_above_0_and_the_cap_holds(found, limit):
    made = pairs.make(_folded(found), limit)
    assert len(made) <= limit
    assert all(pair.chosen.score > pair.rejected.score >= 0 for pair in made)


@quick
@given(searches)
def test_without_a_cap_every_ordered_pair_comes_once(found):
    candidates = _folded(found)
    made = [(pairs.fold(p.chosen.query), pairs.fold(p.rejected.query)) for p in pairs.make(candidates, 10_000)]
    wanted = {(a, b) for a in candidates for b in candidates if candidates[a].score > candidates[b].score}
    assert len(made) == len(set(made))
    assert set(made) == wanted


@quick
@given(searches, st.integers(0, 20))
def test_largest_difference_comes_first_and_a_cut_is_a_prefix(found, limit):
    candidates = _folded(found)
    everything = pairs.make(candidates, 10_000)
    gaps = [pair.chosen.score - pair.rejected.score for pair in everything]
    assert gaps == sorted(gaps, reverse=True)
    assert pairs.make(candidates, limit) == everything[:limit]


@pytest.mark.parametrize("k", [3, 4, 10])
def test_of_equal_differences_the_higher_chosen_score_comes_first(k):
    """Equal by rank: the differences of the scores differ in their last digits."""
    found = [
        pairs.Candidate(f"rank {rank}", None, reward.rank_score(rank, k), frozenset([str(rank)]), rank=rank)
        for rank in range(1, k + 1)
    ]
    ranks = [(pair.chosen.rank, pair.rejected.rank) for pair in pairs.make(_folded(found), 10_000)]
    assert ranks == sorted(ranks, key=lambda pair: (pair[0] - pair[1], pair[0]))


@quick
@given(searches, st.randoms(use_true_random=False), st.integers(0, 20))
def test_the_order_of_searches_does_not_matter(found, random, limit):
    shuffled = list(found)
    random.shuffle(shuffled)
    assert pairs.make(_folded(found), limit) == pairs.make(_folded(shuffled), limit)


@quick
@given(searches)
def test_identical_queries_are_one_with_the_best_of_their_scores(found):
    candidates = _folded(found)
    assert set(candidates) == {pairs.fold(c.query) for c in found}
    for key, candidate in candidates.items():
        same = [c for c in found if pairs.fold(c.query) == key]
        assert candidate.score == max(c.score for c in same)
        assert candidate.query in {c.query for c in same if c.score == candidate.score}
        assert candidate.rollouts == frozenset().union(*(c.rollouts for c in same))


@quick
@given(searches)
def test_a_pair_is_within_exactly_when_one_rollout_searched_both(found):
    for pair in pairs.make(_folded(found), 10_000):
        both = {
            a_rollout for a in found for a_rollout in a.rollouts if pairs.fold(a.query) == pairs.fold(pair.chosen.query)
        } & {r for b in found for r in b.rollouts if pairs.fold(b.query) == pairs.fold(pair.rejected.query)}
        assert (pair.source == "within") == bool(both)


def test_a_cut_leaves_many_queries_rather_than_one_many_times():
    good = [pairs.Candidate(f"good {i}", None, 1.0, frozenset([f"g{i}"])) for i in range(8)]
    bad = [pairs.Candidate(f"bad {i}", None, 0.0, frozenset([f"b{i}"])) for i in range(8)]
    made = pairs.make(_folded([*good, *bad]), 8)
    assert len({p.chosen.query for p in made}) == len({p.rejected.query for p in made}) == 8
