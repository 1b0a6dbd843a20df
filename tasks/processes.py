"""Work on input that may crash or hang whoever reads it, done in processes of its own."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def cores() -> int:
    """How many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_processes(work: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[tuple[T, R | None]]:
    """Each item with what `work` made of it, in order; None where the item killed its process.

    A dying process takes the whole pool with it, so everything that was then under way is done once more, one item at a
    time: one that kills its process there, too, is the culprit.

    Args:
        work: a function that can be pickled. What it raises is raised here.
    """
    waiting = iter(items)
    under_way: deque[tuple[T, ProcessPoolExecutor, Future[R]]] = deque()
    pool, alone = new_pool(workers), new_pool(1)  # their processes start when there is work
    try:
        while True:
            while len(under_way) < 4 * workers:  # bounds what is held in memory
                try:
                    item = next(waiting)
                except StopIteration:
                    break
                under_way.append((item, pool, _submit(pool, work, item)))
            if not under_way:
                return
            item, its_pool, future = under_way.popleft()
            result: R | None
            try:
                result = future.result()
            except BrokenProcessPool:
                if its_pool is pool:
                    pool = new_pool(workers)
                try:
                    result = _submit(alone, work, item).result()
                except BrokenProcessPool:
                    alone, result = new_pool(1), None
            yield item, result
    finally:
        pool.shutdown(cancel_futures=True)
        alone.shutdown(cancel_futures=True)


@contextlib.contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """End this process when the block keeps a core busy for longer. For the main thread of a process of its own."""
    # With the default action a hang inside a C library ends too, where a Python handler would never get its turn.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def new_pool(workers: int) -> ProcessPoolExecutor:
    """Processes that start when there is work, and end when this one does, however it ends."""
    # Spawned, because forking a process that has threads (an orchestrator's, S3's) can deadlock.
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_end_with_parent)


def _submit(pool: ProcessPoolExecutor, work: Callable[[T], R], item: T) -> "Future[R]":
    try:
        return pool.submit(work, item)
    except BrokenProcessPool as error:
        failed: Future[R] = Future()
        failed.set_exception(error)
        return failed


def _end_with_parent() -> None:
    """Make this process, and every program that it runs, end when its parent does, kill -9 included; both would stay."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    os.setpgid(0, 0)  # a group of its own, so that it can be ended as a whole

    def wait() -> None:
        parent.join()
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()
