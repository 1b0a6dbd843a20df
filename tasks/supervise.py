"""Keep a model server alive: notice that it ended, that its engine is dead or that it hangs, and start it again."""

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType
from typing import Protocol

from tasks import config, watchdog
from tasks.artifact import Artifact
from tasks.errors import ServerError
from tasks.logs import log_tail, run_logger
from tasks.serve import Served
from tasks.server_api import check_health

Start = Callable[[], AbstractContextManager[Served]]
"""Starts a server and waits until it answers; leaving the context ends it."""

_WATCH_EVERY_S = 5.0
_ASK_TIMES, _ASK_AGAIN_S = 3, 2.0
_START_AGAIN_S = 10.0
_SILENT_S = 20.0  # a server that reads a long prompt may well take seconds to say that it is well


class Connect(Protocol):
    """A model to ask, for as long as a flow needs one."""

    def __call__(self, adapter: Artifact | None) -> config.Server:
        """Server settings to ask the base model with, or an adapter, which is loaded if need be.

        Raises:
            ServerError: a server did not start, died too often, or refused the adapter.
        """

    def revive(self) -> bool:
        """Start our server again if it is dead; returns whether it was. What others run is not ours to start."""


class Supervised:
    """A server that is started when first needed, and again when it died, until the block ends.

    While it runs, a thread asks whether it is well. One that hangs or whose engine is dead is ended, so that requests
    which wait for it fail at once rather than at their deadline.
    """

    def __init__(self, start: Start, max_restarts: int) -> None:
        self._start, self._max_restarts = start, max_restarts
        self._running = ExitStack()
        self._served: Served | None = None
        self._watch: _Watch | None = None
        self._restarts = 0

    def __enter__(self) -> "Supervised":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def served(self) -> Served:
        """The server, which runs now.

        Raises:
            ServerError: it did not start, or died more often than `max_restarts`.
        """
        if self._served is None:
            self._begin()
        elif (code := self._served.process.poll()) is not None:
            self._again(f"it ended with code {code}")
        assert self._served is not None
        return self._served

    def revive(self) -> bool:
        """Start the server again if it is dead; returns whether it was. One that was never needed is not.

        Raises:
            ServerError: it did not start, or died more often than `max_restarts`.
        """
        reason = why_dead(self._served) if self._served else None
        if reason:
            self._again(reason)
        return reason is not None

    def _begin(self) -> None:
        self._served = self._running.enter_context(self._start())
        self._watch = _Watch(self._served)
        self._watch.start()

    def _end(self) -> None:
        if self._watch:
            self._watch.over.set()
        self._running.close()
        self._served = self._watch = None

    def _again(self, reason: str) -> None:
        assert self._served is not None
        if self._watch and self._watch.reason:
            reason = self._watch.reason
        tail = log_tail(self._served.log)
        self._end()
        while self._served is None:
            if self._restarts == self._max_restarts:
                raise ServerError(
                    f"the model server died once more than max_restarts ({self._max_restarts}) allows: {reason}. What was "
                    f"finished is kept, and the same command goes on from there. Its log ends:\n{tail}"
                )
            self._restarts += 1
            run_logger().warning(
                "the model server is dead: %s; starting it again (%d of at most %d times). Its log ends:\n%s",
                reason,
                self._restarts,
                self._max_restarts,
                tail,
            )
            try:
                self._begin()
            except ServerError as error:
                reason, tail = "it did not start again", str(error)
                time.sleep(_START_AGAIN_S)  # what holds its port, or its card's memory, may be about to go
        run_logger().info("the model server answers again")


def why_dead(served: Served) -> str | None:
    """Why a server cannot be relied on any more: it ended, or was asked several times and never well. None if it is well."""
    said = ""
    for _ in range(_ASK_TIMES):
        if said:
            time.sleep(_ASK_AGAIN_S)
        if (code := served.process.poll()) is not None:
            return f"it ended with code {code}"
        try:
            check_health(served.base_url, _SILENT_S)
        except ServerError as error:
            said = str(error)
        else:
            return None
    return said


class _Watch(threading.Thread):
    """Ends a server once it is dead. `reason` then says why it was ended."""

    def __init__(self, served: Served) -> None:
        super().__init__(daemon=True, name=f"watch {served.base_url}")
        self._served = served
        self.over, self.reason = threading.Event(), ""

    def run(self) -> None:
        """Ask every few seconds, until the server is dead or this is `over`."""
        while not self.over.wait(_WATCH_EVERY_S):
            if reason := why_dead(self._served):
                self.reason = reason
                watchdog.stop(self._served.process)
                return
