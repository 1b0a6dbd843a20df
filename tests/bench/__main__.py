"""Every number that the README quotes, against peers measured in the same run: make bench

    python -m tests.bench [--quick]

About eleven minutes on two cores that have nothing else to do; --quick takes four and says less. Exits with 1 when a target is
missed.
"""

import argparse
import sys

from rich.console import Console
from rich.table import Table

from tests.bench import bench_collect, bench_finetune, bench_images, bench_search


def met(ratio: float, target: str) -> bool:
    """Whether a ratio keeps its target, such as "≥ 0.95"."""
    sign, _, number = target.partition(" ")
    return ratio >= float(number) if sign == "≥" else ratio <= float(number)


def main() -> int:
    """Run all benches and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    rows = [row for bench in (bench_search, bench_collect, bench_images, bench_finetune) for row in bench.run(quick)]
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
