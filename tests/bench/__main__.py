"""Every number that the README quotes, against peers measured in the same run: make bench

    python -m tests.bench [--quick]

About nine minutes on two cores that have nothing else to do; --quick takes four and says less. Exits with 1 when a target is
missed.
"""

import argparse
import asyncio
import sys
from collections.abc import Sequence

from prefect import flow, task
from prefect.testing.utilities import prefect_test_harness
from rich.console import Console
from rich.table import Table

from tasks.collect import Shard
from tests.bench import bench_collect, bench_finetune, bench_images, bench_search


async def as_task_runs(shards: Sequence[Shard], run_shard: bench_collect.RunShard) -> None:
    """Run the shards as a flow does: each a Prefect task run, side by side."""

    @task(name="shard", persist_result=False)
    async def shard_task(shard: Shard) -> None:
        await run_shard(shard)

    @flow(name="bench")
    async def bench() -> None:
        await asyncio.gather(*(shard_task(shard) for shard in shards))

    await bench()


def met(ratio: float, target: str) -> bool:
    """Whether a ratio keeps its target, such as "≥ 0.95"."""
    sign, _, number = target.partition(" ")
    return ratio >= float(number) if sign == "≥" else ratio <= float(number)


def main() -> int:
    """Run all benches and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    rows = bench_search.run(quick)
    with prefect_test_harness(server_startup_timeout=120):
        rows += bench_collect.run(quick, as_task_runs)
    rows += bench_images.run(quick)
    rows += bench_finetune.run(quick)
    table = Table("", "ours", "peer", "ratio", "target", "", title="Benchmarks", title_justify="left")
    for row in rows:
        kept = met(row["ratio"], row["target"])
        table.add_row(
            row["name"],
            f"{row['ours']:,.4g} {row['unit']}",
            f"{row['peer']:,.4g} {row['unit']}",
            f"{row['ratio']:.2f}",
            row["target"],
            "met" if kept else "missed",
        )
    Console().print(table)
    return 0 if all(met(row["ratio"], row["target"]) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
