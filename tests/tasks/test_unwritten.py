"""Finished rollouts before they are stored: none is lost, and no shard pays for another one's storage."""

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tasks import artifact, collect
from tasks.collect import RolloutSpec
from tasks.errors import ConfigError, DragError, StorageError
from tasks.unwritten import Row, Unwritten
from tests.tasks.test_collect import _row, _shard, _stored


class Store:
    """Takes rows in parts; or refuses them, or holds them up, as told."""

    def __init__(self) -> None:
        self.parts: list[list[Row]] = []
        self.refuses = False
        self.goes_on = threading.Event()
        self.goes_on.set()
        self.began = threading.Event()

    def __call__(self, rows: Sequence[Row]) -> None:
        self.began.set()
        assert self.goes_on.wait(60)
        if self.refuses:
            raise StorageError("the storage does not answer")
        self.parts.append(list(rows))

    @property
    def ids(self) -> list[int]:
        return sorted(row["n"] for part in self.parts for row in part)


async def test_rows_are_written_once_that_of_the_shard_with_most_first() -> None:
    unwritten, one, two = Unwritten(4), Store(), Store()
    async with unwritten.shard("one", one) as first, unwritten.shard("two", two) as second:
        for n in range(3):
            await unwritten.add(first, {"n": n})
        assert one.parts == []
        await unwritten.add(second, {"n": 3})
        assert (one.ids, two.ids) == ([0, 1, 2], [])
    assert (one.ids, two.ids) == ([0, 1, 2], [3])
    assert unwritten.left("one") == unwritten.left("two") == []


async def test_a_shard_whose_rows_are_refused_fails_alone_and_its_next_try_has_them() -> None:
    unwritten, ill, well = Unwritten(2), Store(), Store()
    ill.refuses = True

    async def run_ill() -> None:
        async with unwritten.shard("ill", ill) as rows:
            for n in range(3):
                await unwritten.add(rows, {"n": n})

    async with unwritten.shard("well", well) as rows:
        with pytest.raises(StorageError):
            await run_ill()
        for n in range(5):
            await unwritten.add(rows, {"n": n})
    assert well.ids == [0, 1, 2, 3, 4]
    assert [row["n"] for row in unwritten.left("ill")] == [0, 1, 2]
    ill.refuses = False
    async with unwritten.shard("ill", ill):
        pass
    assert ill.ids == [0, 1, 2]
    assert unwritten.left("ill") == []


async def test_whoever_is_cancelled_in_a_write_leaves_each_row_in_one_part() -> None:
    """Also those of another shard, which it was writing."""
    unwritten, mine, other = Unwritten(3), Store(), Store()
    other.goes_on.clear()

    async def run_mine() -> None:
        async with unwritten.shard("mine", mine) as rows:
            await unwritten.add(rows, {"n": 9})

    async with unwritten.shard("other", other) as rows:
        rows.waiting += [{"n": 0}, {"n": 1}]
        task = asyncio.create_task(run_mine())
        assert await asyncio.to_thread(other.began.wait, 60)
        rows.waiting.append({"n": 2})
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert mine.ids == [9]
        other.goes_on.set()
    assert other.ids == [0, 1, 2]


async def test_a_cancelled_shard_writes_what_nobody_writes_yet() -> None:
    unwritten, store = Unwritten(2), Store()

    async def run() -> None:
        async with unwritten.shard("shard", store) as rows:
            await unwritten.add(rows, {"n": 0})
            await asyncio.Event().wait()

    task = asyncio.create_task(run())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert store.ids == [0]


async def test_a_cancelled_shard_writes_what_a_thread_that_may_fail_is_writing() -> None:
    unwritten, began, goes_on = Unwritten(2), threading.Event(), threading.Event()
    stored: list[Row] = []

    def write(rows: Sequence[Row]) -> None:
        if threading.current_thread() is not threading.main_thread():
            began.set()
            assert goes_on.wait(60)
            raise StorageError("the storage does not answer")
        stored.extend(rows)

    async def run() -> None:
        async with unwritten.shard("shard", write) as rows:
            rows.waiting.append({"n": 0})
            await unwritten.add(rows, {"n": 1})

    task = asyncio.create_task(run())
    assert await asyncio.to_thread(began.wait, 60)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    goes_on.set()
    assert [row["n"] for row in stored] == [0, 1]
    assert unwritten.left("shard") == []


async def test_an_error_in_a_shard_is_what_it_ends_with_once_its_rows_are_written() -> None:
    unwritten, store = Unwritten(9), Store()

    async def run() -> None:
        async with unwritten.shard("shard", store) as rows:
            await unwritten.add(rows, {"n": 0})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await run()
    assert store.ids == [0]


async def test_a_shard_that_could_not_be_stored_pays_for_no_rollout_again(tmp_path: Path) -> None:
    """On a real storage, in whose place for the shard's parts a file lies meanwhile."""
    unwritten, asked, blocked = Unwritten(4), [], tmp_path / "shard-00000"

    async def attempt(spec: RolloutSpec, number: int) -> dict[str, Any]:
        if not asked:
            blocked.write_text("in the way")
        asked.append(spec.rollout_id)
        return _row(spec, number)

    with pytest.raises(DragError) as refused:
        await collect.run_shard(_shard(10), uri=str(tmp_path), unwritten=unwritten, attempt=attempt)
    assert isinstance(refused.value, StorageError | ConfigError)
    assert len(asked) == 10
    blocked.unlink()
    report = await collect.run_shard(_shard(10), uri=str(tmp_path), unwritten=unwritten, attempt=attempt)
    assert (report.failed, len(asked)) == ({}, 10)
    assert sorted(str(r["rollout_id"]) for r in _stored(str(tmp_path))) == sorted(asked)
    assert artifact.read_parts(str(tmp_path), collect.SCHEMA).num_rows == 10
