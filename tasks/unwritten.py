"""Finished rollouts that no part holds yet: what a kill would cost, bounded over all shards of a process together."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from tasks.errors import DragError
from tasks.logs import run_logger

Row = Mapping[str, Any]
Write = Callable[[Sequence[Row]], None]


class ShardRows:
    """Rows of a shard in the order in which their rollouts ended, each until a part that holds it is known to be written."""

    def __init__(self) -> None:
        self.write: Write = lambda rows: None
        self.waiting: list[Row] = []
        self.under_way = 0  # the first so many are being written
        self.writing: asyncio.Future[None] | None = None
        self.refused = False  # storage did not take them: the shard itself tries again, at its end

    def ready(self) -> int:
        """How many wait for a part that nobody has begun to write."""
        return len(self.waiting) - self.under_way

    async def flush(self) -> None:
        """Write all that waits, after what is being written.

        Raises:
            DragError: storage does not take it; it goes on waiting.
        """
        while self.writing:
            await asyncio.wait({self.writing})
        if not self.waiting:
            return
        self.under_way = len(self.waiting)
        self.writing = asyncio.ensure_future(asyncio.to_thread(self.write, self.waiting[: self.under_way]))
        self.writing.add_done_callback(self._written)
        await asyncio.shield(self.writing)  # a thread that has begun goes on, whoever is cancelled

    def _written(self, writing: "asyncio.Future[None]") -> None:
        if not writing.cancelled() and not writing.exception():
            del self.waiting[: self.under_way]
        self.under_way, self.writing = 0, None


class Unwritten:
    """When `flush_every` finished rollouts wait, those of the shard that has most are written as a part.

    So fewer wait at any time, beside those that end while a part is being written, and those that storage did not take.
    """

    def __init__(self, flush_every: int) -> None:
        self._flush_every = flush_every
        self._shards: dict[str, ShardRows] = {}

    def left(self, shard: str) -> list[Row]:
        """What an earlier try of a shard could not write."""
        return self._shards[shard].waiting if shard in self._shards else []

    @contextlib.asynccontextmanager
    async def shard(self, name: str, write: Write) -> AsyncIterator[ShardRows]:
        """The rows of a shard, for the length of the block, with those that an earlier try left. At its end all are written.

        Args:
            write: stores rows as one part. It is called in a thread, unless the block is cancelled.

        Raises:
            DragError: storage does not take them; the next try will find them.
        """
        rows = self._shards.setdefault(name, ShardRows())
        rows.write, rows.refused = write, False
        try:
            yield rows
        except asyncio.CancelledError:
            if rows.waiting:
                # Here: whoever was cancelled may not be allowed to wait for a thread. And also what a thread is writing, for that
                # may fail; a row that stands in two parts counts once.
                rows.write(rows.waiting)
                rows.waiting.clear()
            raise
        except Exception:
            await rows.flush()
            raise
        else:
            await rows.flush()
        finally:
            if not rows.waiting:
                del self._shards[name]

    async def add(self, shard: ShardRows, row: Row) -> None:
        """Take a row of a shard, and write what waits if that is too much."""
        shard.waiting.append(row)
        while True:
            shards = [rows for rows in self._shards.values() if not rows.refused]
            idle = [rows for rows in shards if not rows.writing and rows.waiting]
            if not idle or sum(rows.ready() for rows in shards) < self._flush_every:
                return  # nothing is idle: whoever is writing looks again
            fullest = max(idle, key=ShardRows.ready)
            try:
                await fullest.flush()
            except DragError as error:  # it may be another shard's, which can do without this
                fullest.refused = True
                run_logger().warning("finished rollouts wait to be stored: %s", error)
