"""Workers as processes, in a folder that has nothing of the project, with an environment that has none of its secrets."""

import contextlib
import os
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from prefect.client.base import PrefectHttpxSyncClient

from tasks import watchdog
from tasks.logs import log_tail

ROOT = Path(__file__).parents[1]
FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
# as Prefect's own client does, it asks again while the database is busy (503), and raises on every error
API = PrefectHttpxSyncClient(timeout=60)
_PATIENCE_S = 500  # never waited for unless something is broken


@contextlib.contextmanager
def worker(
    pool: str,
    folder: Path,
    without: Collection[str] = (),
    environment: Mapping[str, str] = MappingProxyType({}),
    limit: int | None = None,
) -> Iterator[Path]:
    """A process worker of a pool for the length of the block, which inherits the environment but for `without`; its log.

    Args:
        environment: variables that it has besides.
        limit: runs that it takes at once.
    """
    folder.mkdir()
    # A command that an earlier test ran in this process may have quietened the logs that tests of workers read.
    without = {*without, "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"}
    env = {name: value for name, value in os.environ.items() if name not in without}
    env |= {"PYTHONPATH": str(ROOT), "PREFECT_WORKER_QUERY_SECONDS": "1", "TMPDIR": str(folder)} | dict(environment)
    log = folder / "worker.log"
    at_once = f" --limit {limit}" if limit else ""
    start = f"exec {sys.executable} -m flows.worker --pool {pool} --type process{at_once}"
    command = ["-c", f"cd {folder} && {start}"]
    with log.open("wb") as output:
        process = watchdog.start(["bash", *command], env=env, output=output)
    try:
        yield log
    finally:
        watchdog.stop(process)


def start_run(
    url: str,
    deployment: str,
    parameters: dict[str, Any] | None = None,
    scheduled: datetime | None = None,
    queue: str | None = None,
) -> str:
    """Start a run of a deployment, as the UI's button does, or as its schedule had it at a time; returns its id.

    Args:
        queue: of its pool, in which it waits; its deployment's when None.
    """
    found = API.get(f"{url}/deployments/name/{deployment}").json()
    details = {"scheduled_time": scheduled.isoformat()} if scheduled else {}
    body = {"parameters": parameters or {}, "state": {"type": "SCHEDULED", "state_details": details}}
    body |= {"work_queue_name": queue} if queue else {}
    made = API.post(f"{url}/deployments/{found['id']}/create_flow_run", json=body)
    return made.json()["id"]


def parent(pid: int) -> int:
    """The process that started another; of a flow run's, its worker."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def ended(url: str, run: str, log: Path) -> dict[str, Any]:
    """The flow run once it has come to an end."""
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline:
        found = API.get(f"{url}/flow_runs/{run}").json()
        if found["state_type"] in FINAL:
            return found
        time.sleep(0.5)
    raise AssertionError(f"the run did not end:\n{log_tail(log)}")


def listed(url: str, kind: str, **chosen: Any) -> list[dict[str, Any]]:
    """Everything of a kind that the API shows without being asked for secrets."""
    found: list[dict[str, Any]] = []
    while True:
        body = {"limit": 200, "offset": len(found), **chosen}
        page = API.post(f"{url}/{kind}/filter", json=body).json()
        found += page
        if len(page) < 200:
            return sorted(found, key=lambda item: item["id"])
