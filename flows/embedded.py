"""The Prefect server that the command line brings along when PREFECT_API_URL names none.

It is a real server with its UI, on loopback, over a SQLite database in DRAG_HOME (by default ~/.drag), so earlier runs stay
visible. It ends with the command that started it, also when that is killed. Of two commands at once each has a server of its
own over the same database; the second starts its when the first one's is up.
"""

import contextlib
import os
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from prefect.client.orchestration import get_client
from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogHandler
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
    get_current_settings,
    temporary_settings,
)

from tasks import folders, locks, storage, watchdog
from tasks.errors import ServerError
from tasks.logs import log_tail
from tasks.network import free_port

_START_TIMEOUT_S = 120


@contextlib.contextmanager
def prefect_server() -> Iterator[str]:
    """Yields the address of the Prefect API: the configured one, or that of a server which lives as long as the block.

    Raises:
        ServerError: the embedded server did not start, and the message holds the end of its log; or the configured one does
            not answer.
    """
    configured = get_current_settings().api.url
    if configured:
        with get_client(sync_client=True) as client:
            if error := client.api_healthcheck():
                raise ServerError(f"no Prefect server answers at {configured}: {error}; check or unset PREFECT_API_URL")
        yield configured
        return
    with own_server(folders.home_folder()) as url:
        yield url


@contextlib.contextmanager
def own_server(home: Path) -> Iterator[str]:
    """Flows in the block run on a server over a database in `home`, which ends with it; yields its API's address.

    They tell it no heartbeats: nobody there waits for those of a run that was killed, and each flow would wait at its end for
    the thread that sends them, half a second as a rule.

    Raises:
        ServerError: it did not start; the message holds the end of its log.
    """
    with server_process(home) as url, using(url), temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        yield url


@contextlib.contextmanager
def server_process(home: Path) -> Iterator[str]:
    """A Prefect server with all its services over a database in `home`, for as long as the block; yields its API's address.

    Raises:
        ServerError: it did not start; the message holds the end of its log.
    """
    folders.make(home)
    port = free_port()
    log = home / "prefect-server.log"
    env = dict(os.environ) | {
        "PREFECT_HOME": str(home / "prefect"),
        "PREFECT_API_URL": "",
        "PREFECT_UI_API_URL": f"http://127.0.0.1:{port}/api",
        # copied there at the start: by itself into Prefect's package, which may be read-only
        "PREFECT_SERVER_UI_STATIC_DIRECTORY": str(home / "prefect-ui"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",  # runs that ended 90 days ago are forgotten
        "PREFECT_LOGGING_SERVER_LEVEL": "WARNING",
    }
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with contextlib.ExitStack() as stack:
        with contextlib.ExitStack() as starting:
            with storage.local_errors(str(home), "written to"):
                alone = starting.enter_context((home / "starting.lock").open("wb"))
                output = starting.enter_context(log.open("wb"))
            locks.hold(alone)  # a server brings its database up to date when it starts, which two must not do
            process = watchdog.start(command, env=env, output=output)
            stack.callback(watchdog.stop, process)
            started = time.monotonic()
            while not _healthy(port):
                if process.poll() is not None or time.monotonic() - started > _START_TIMEOUT_S:
                    raise ServerError(f"the Prefect server did not start:\n{log_tail(log)}")
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/api"


@contextlib.contextmanager
def using(url: str) -> Iterator[None]:
    """Everything in the block talks to that server; what is still to be sent at its end is sent."""
    _send_all()  # to the server of before: what sends in the background stays with the server that it began with
    with temporary_settings({PREFECT_API_URL: url}):
        try:
            yield
        finally:  # later it would find nobody
            _send_all()


def _send_all() -> None:
    APILogHandler().flush()
    EventsWorker.drain_all(timeout=5)


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/health", timeout=5) as reply:
            return reply.status == 200
    except OSError:
        return False
