"""Weights of examples: mean 1, in the order that their scheme says."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.training.weights import SCHEMES, weigh

ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "rank_score": st.sampled_from([None, 0.0, 1 / 3, 2 / 3, 1.0]),
            "effort": st.sampled_from([None, 0.0, 0.1, 0.5, 1.0]),
            "gt_rank": st.sampled_from([None, 1, 2, 3]),
        }
    ),
    max_size=20,
)


@given(rows=ROWS, scheme=st.sampled_from(sorted(SCHEMES)))
def test_the_mean_weight_of_what_is_trained_on_is_1(rows: list[dict[str, float | None]], scheme: str) -> None:
    weights = weigh(rows, scheme)
    counted = [weight for weight in weights if weight]
    assert len(weights) == len(rows)
    assert all(weight >= 0 for weight in weights)
    assert not counted or sum(counted) / len(counted) == pytest.approx(1)


def test_formulas() -> None:
    rows = [
        {"rank_score": 1.0, "effort": 1.0, "gt_rank": 1},
        {"rank_score": 0.5, "effort": 0.5, "gt_rank": 2},
        {"rank_score": 0.0, "effort": 0.0, "gt_rank": None},
    ]
    assert weigh(rows, "none") == [1, 1, 1]
    assert weigh(rows, "rank-score") == pytest.approx([1 / 0.75, 0.5 / 0.75, 0])
    assert weigh(rows, "rank-sq") == pytest.approx([1 / 0.625, 0.25 / 0.625, 0])
    assert weigh(rows, "inv-effort") == pytest.approx([1.2, 0.8, 0])
    assert weigh(rows, "binary") == [1, 0, 0]
