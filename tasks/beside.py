"""A coroutine in an event loop of its own thread, so that the thread that waits for it hears at once that it is to end.

Prefect ends a run whose slot is lost, or whose process is told to stop, by an exception that it throws into the run's thread.
Thrown into a busy event loop it comes out in whatever callback runs just then, and asyncio goes on with the next one
(asyncio/events.py, Handle._run). A thread that only waits takes it where it stands.
"""

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")
_LOOK_EVERY_S = 0.2  # what another thread throws arrives between two steps of Python, not in the midst of a wait


def run_beside(coroutine: Coroutine[Any, Any, T]) -> T:
    """What `asyncio.run` would return or raise.

    Whatever is thrown into this thread meanwhile is raised once the coroutine has been cancelled and has ended.
    """
    made: Future[T] = Future()
    begun: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[T]]] = Future()
    ended = threading.Event()

    async def begin() -> T:
        task = asyncio.current_task()
        assert task
        begun.set_result((asyncio.get_running_loop(), task))
        return await coroutine

    def work() -> None:
        try:
            made.set_result(asyncio.run(begin()))
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            made.set_exception(error)
        finally:
            ended.set()

    threading.Thread(target=contextvars.copy_context().run, args=(work,), name="event loop", daemon=True).start()
    try:
        _wait(ended)
    except BaseException:
        loop, task = begun.result()
        with contextlib.suppress(RuntimeError):  # the loop is closed: it has just ended by itself
            loop.call_soon_threadsafe(task.cancel)
        _wait(ended)
        raise
    return made.result()


def _wait(ended: threading.Event) -> None:
    # not Thread.join: interrupted, Python 3.11's takes the thread for one that has ended
    while not ended.wait(_LOOK_EVERY_S):
        pass
