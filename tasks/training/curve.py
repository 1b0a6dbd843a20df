"""The loss curve: a table of one row an optimizer step, and what to say of it in short."""

from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa

from tasks.artifact import table_of


def curve_table(history: Iterable[Mapping[str, Any]]) -> pa.Table:
    """Table of loss_curve/1 from a trainer's history.

    Columns: step from 1, epoch, loss (mean over the step's learned tokens, weighted), eval_loss (mean over the learned tokens
    of the examples that are not trained on, where it was measured), tokens and seconds up to then.
    """
    rows: dict[int, dict[str, Any]] = {}
    measured: dict[int, float] = {}
    for entry in history:
        if "eval_loss" in entry:
            measured[entry["step"]] = entry["eval_loss"]
        elif "loss" in entry:
            rows[entry["step"]] = {name: entry[name] for name in ("step", "epoch", "loss", "tokens", "seconds")}
    return table_of(({**row, "eval_loss": measured.get(step)} for step, row in sorted(rows.items())), "loss_curve/1")


def summary(table: pa.Table) -> dict[str, float | None]:
    """The last loss and eval_loss, the seconds it took, and tokens a second."""
    last = table.slice(table.num_rows - 1).to_pylist()[0]
    return {
        "loss": last["loss"],
        "eval_loss": last["eval_loss"],
        "seconds": last["seconds"],
        "tokens_per_second": last["tokens"] / last["seconds"],
    }
