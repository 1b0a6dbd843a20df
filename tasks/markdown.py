"""Markdown tables, as reports, cards and the Prefect UI show them."""

import re
from collections.abc import Collection, Iterable, Sequence


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], right: Collection[int] = ()) -> str:
    """A table whose cells may hold anything: a bar in one ends no cell, and a line break no row.

    Args:
        right: numbers of the columns, from 0, that stand to the right.
    """
    below = ["---:" if column in right else "---" for column in range(len(header))]
    lines = [[*map(_cell, header)], below, *([*map(_cell, row)] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    # backslashes before a bar are doubled, or they would belong to the one that it gets
    return re.sub(r"(\\*)\|", r"\1\1\\|", " ".join(text.splitlines()))
