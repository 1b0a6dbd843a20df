"""The loss curve, as a table."""

from tasks.training.curve import curve_table, summary

HISTORY = [
    {"step": 1, "loss": 3.0, "epoch": 0.5, "tokens": 100, "seconds": 2.0, "learning_rate": 1e-3},
    {"step": 2, "measured": {"loss": 2.5, "accuracy": 0.75, "margin": None}},
    {"step": 2, "loss": 2.0, "epoch": 1.0, "tokens": 200, "seconds": 4.0},
    {"train_runtime": 4.0, "step": 2},
]


def test_one_row_a_step() -> None:
    table = curve_table(HISTORY)
    assert table.column("step").to_pylist() == [1, 2]
    assert table.column("eval_loss").to_pylist() == [None, 2.5]
    assert table.column("measured").to_pylist()[0] is None
    assert summary(table) == {
        "loss": 2.0,
        "eval_loss": 2.5,
        "measured": {"accuracy": 0.75, "margin": None},
        "seconds": 4.0,
        "tokens_per_second": 50.0,
    }
