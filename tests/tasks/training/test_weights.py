"""Weights of examples: in the order that their scheme says, and with mean 1 over what is trained on."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.training.examples import Example, Item, Pair
from tasks.training.weights import SCHEMES, with_mean_one

WEIGHTS = st.lists(st.floats(0.01, 1), min_size=1, max_size=4)
EXAMPLES = st.builds(lambda weights: Item(tuple(Example((1, 2), (1,), w) for w in weights)), WEIGHTS)
PAIRS = st.builds(
    lambda weights: Item(
        tuple(Example((1, n), (1,)) for n in range(len(weights) + 1)),
        tuple(Pair(n, n + 1, 0.5, w) for n, w in enumerate(weights)),
    ),
    WEIGHTS,
)


def weights(items: list[Item]) -> list[float]:
    return [part.weight for item in items for part in item.pairs or item.examples]


@given(st.lists(EXAMPLES, max_size=5) | st.lists(PAIRS, max_size=5))
def test_the_mean_weight_is_1_and_nothing_else_changes(items: list[Item]) -> None:
    scaled = with_mean_one(items)
    before, after = weights(items), weights(scaled)
    assert not after or sum(after) / len(after) == pytest.approx(1)
    assert after == pytest.approx([weight * sum(after) / sum(before) for weight in before])
    for one, other in zip(items, scaled, strict=True):
        assert [example.ids for example in one.examples] == [example.ids for example in other.examples]
        assert [(p.better, p.worse, p.gap) for p in one.pairs] == [(p.better, p.worse, p.gap) for p in other.pairs]


@pytest.mark.parametrize(
    ("scheme", "weights"),
    [
        ("none", [1, 1, 1, 1]),
        ("rank-score", [1, 0.5, 0, 0]),
        ("rank-sq", [1, 0.25, 0, 0]),
        ("inv-effort", [1, 2 / 3, 0, 0]),
        ("binary", [1, 0, 0, 0]),
    ],
)
def test_formulas(scheme: str, weights: list[float]) -> None:
    rows = [
        {"rank_score": 1.0, "effort": 1.0, "gt_rank": 1},
        {"rank_score": 0.5, "effort": 0.5, "gt_rank": 2},
        {"rank_score": 0.0, "effort": 0.0, "gt_rank": None},
        {"rank_score": None, "effort": None, "gt_rank": None},
    ]
    assert [SCHEMES[scheme](row) for row in rows] == pytest.approx(weights)
