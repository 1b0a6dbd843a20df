"""Failed rollouts of a collection: listed on the run's page, announced where they are many, and judged."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from prefect.artifacts import create_table_artifact
from prefect.events import emit_event
from prefect.runtime import flow_run
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tasks import collect, config
from tasks.collect import Shard, ShardReport
from tasks.errors import CollectError
from tasks.set_aside import printable

KEY = "failed-rollouts"
EVENT = "drag.collect.failed-share"
_MOST_ROWS = 300
_COLUMNS = ["rollout_id", "status", "attempt", "outcome", "failure_detail", "question_id", "sampling", "sample"]

Row = dict[str, Any]


def judge(reports: Sequence[ShardReport], shards: Sequence[Shard], uri: str, settings: config.Collect) -> None:
    """Tell which rollouts failed and why, and raise when they are more than may.

    Told are the run's page (a table), the terminal (a line a reason), and, where the share is above `notify_failed_share`,
    whoever listens to the event drag.collect.failed-share.

    Args:
        reports: of the shards that were run. In the others nothing was left to do.
        shards: all.
        uri: folder of the run.

    Raises:
        CollectError: more rollouts failed than `allow_failed_share`.
    """
    planned = sum(len(shard.rollouts) for shard in shards)
    reasons: Counter[str] = Counter()
    for report in reports:
        reasons.update(report.failed)
    failed = reasons.total()
    if not failed:
        if again := sum(report.tried_again for report in reports):
            _list([], f"None. The {again} that had failed before are finished.")
        return

    with_failures = {report.number for report in reports if report.failed}
    rows: list[Row] = []
    for row in _failed_rows([shard for shard in shards if shard.number in with_failures], uri):
        rows.append(row)
        if len(rows) == min(failed, _MOST_ROWS):
            break
    counts = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
    more = f" {failed - len(rows)} more are not listed." if failed > len(rows) else ""
    _list(rows, f"{failed} of {planned} rollouts failed ({counts}). Retry redoes only these.{more}")
    _say(rows, reasons, planned)
    if failed > settings.notify_failed_share * planned:
        emit_event(
            EVENT,
            resource={"prefect.resource.id": f"prefect.flow-run.{flow_run.id}", "prefect.resource.name": flow_run.name},
            payload={"share": failed / planned, "failed": failed, "planned": planned, "reasons": dict(reasons)},
        )
    if failed > settings.allow_failed_share * planned:
        raise CollectError(
            f"{failed} of {planned} rollouts failed ({counts}); the others are kept: the same command again"
            f"{'' if settings.resume else ' without --no-resume'}, or Retry, redoes only these, and "
            f"--allow-failed-share {failed / planned:.2g} would do without them"
        )


def _failed_rows(shards: Sequence[Shard], uri: str) -> Iterator[Row]:
    for shard in shards:
        for row in collect.attempts_that_count(shard, uri, _COLUMNS).to_pylist():
            if row["status"] == "failed":
                yield {
                    "question": row["question_id"],
                    "sampling": row["sampling"],
                    "sample": row["sample"],
                    "attempt": row["attempt"],
                    "reason": row["outcome"],
                    "detail": printable(row["failure_detail"] or ""),
                }


def _list(rows: list[Row], description: str) -> None:
    create_table_artifact(rows, key=KEY, description=description)


def _say(rows: Sequence[Row], reasons: Counter[str], planned: int) -> None:
    table = Table(title=f"Failed rollouts: {reasons.total()} of {planned}", title_justify="left")
    table.add_column("reason")
    table.add_column("times", justify="right")
    table.add_column("such as")
    for reason, count in reasons.most_common():
        example = next((row for row in rows if row["reason"] == reason), None)
        shown = f"{example['question']}: {example['detail']}" if example else ""
        table.add_row(reason, str(count), escape(shown))
    Console(stderr=True).print(table)
