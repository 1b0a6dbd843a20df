"""Finished rollouts that no part holds yet: what a kill would cost, bounded over all shards of a process together."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


class ShardRows:
    """Rows of a shard in the order in which their rollouts ended, each until a part that holds it is known to be written."""

    def __init__(self, write: Callable[[Sequence[Row]], None]) -> None:
        self.write = write
        self.waiting: list[Row] = []
        self.under_way = 0  # the first so many are being written
        self.alone = asyncio.Lock()

    def ready(self) -> int:
        """How many wait for a part that nobody has begun to write."""
        return len(self.waiting) - self.under_way

    async def flush(self) -> None:
        """Write all that waits, after what is being written."""
        async with self.alone:
            if not self.waiting:
                return
            self.under_way = len(self.waiting)
            try:
                await asyncio.to_thread(self.write, self.waiting[: self.under_way])
                del self.waiting[: self.under_way]
            finally:
                self.under_way = 0


class Unwritten:
    """When `flush_every` finished rollouts wait, those of the shard that has most are written as a part.

    So fewer wait at any time, beside those that end while a part is being written.
    """

    def __init__(self, flush_every: int) -> None:
        self._flush_every = flush_every
        self._shards: list[ShardRows] = []

    @contextlib.contextmanager
    def shard(self, write: Callable[[Sequence[Row]], None]) -> Iterator[ShardRows]:
        """The rows of one more shard, for the length of the block. What waits at its end is written then and there.

        Args:
            write: stores rows as one part. It is called in a thread, but at the block's end.
        """
        rows = ShardRows(write)
        self._shards.append(rows)
        try:
            yield rows
        finally:
            self._shards.remove(rows)
            if rows.waiting:
                write(rows.waiting)  # whoever was cancelled may not be allowed to wait for a thread

    async def add(self, shard: ShardRows, row: Row) -> None:
        """Take a row of a shard, and write what waits if that is too much."""
        shard.waiting.append(row)
        while sum(rows.ready() for rows in self._shards) >= self._flush_every:
            fullest = max((rows for rows in self._shards if not rows.under_way), key=ShardRows.ready, default=None)
            if fullest is None or not fullest.ready():
                return  # whoever is writing looks again
            await fullest.flush()
