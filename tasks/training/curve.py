"""The loss curve: a table of one row an optimizer step, and what to say of it in short."""

from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa

from tasks.artifact import table_of


def curve_table(history: Iterable[Mapping[str, Any]]) -> pa.Table:
    """Table of loss_curve/2 from a trainer's history.

    Columns: step from 1, epoch, loss (weighted mean over the step's units: tokens, pairs or queries), eval_loss (mean over those
    of the items that are not trained on, where it was measured), what else the method measured on them by name, tokens and
    seconds up to then.
    """
    rows: dict[int, dict[str, Any]] = {}
    measured: dict[int, dict[str, float | None]] = {}
    for entry in history:
        if "measured" in entry:
            measured[entry["step"]] = entry["measured"]
        elif "loss" in entry:
            rows[entry["step"]] = {name: entry[name] for name in ("step", "epoch", "loss", "tokens", "seconds")}
    for step, found in measured.items():
        others = [{"name": name, "value": value} for name, value in found.items() if name != "loss"]
        rows[step] |= {"eval_loss": found["loss"], "measured": others}
    return table_of((row for _, row in sorted(rows.items())), "loss_curve/2")


def summary(table: pa.Table) -> dict[str, Any]:
    """The last loss, eval_loss and what else was measured with it, the seconds it took, and tokens a second."""
    last = table.slice(table.num_rows - 1).to_pylist()[0]
    return {
        "loss": last["loss"],
        "eval_loss": last["eval_loss"],
        "measured": {entry["name"]: entry["value"] for entry in last["measured"] or []},
        "seconds": last["seconds"],
        "tokens_per_second": last["tokens"] / last["seconds"],
    }
