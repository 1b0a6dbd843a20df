"""A worker whose runs are told before it ends: what the images of infra/ start.

    python -m flows.worker --pool gpu-serving --type process

It is `prefect worker start`, with the same options. That one, told to stop (docker stop, an upgrade), kills its runs at once:
what they had not written is lost, and nobody hears that they ended. This one ends them as a cancel does, so that they write
what they have, stop what they started and report; then it stops the worker. Retry goes on with the runs that it ended.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

GRACE_S = 50.0
"""Seconds that runs have to end. Whoever stops a worker waits longer: stop_grace_period in infra/compose.yaml."""
_LOOK_EVERY_S = 0.2


def main(options: Sequence[str]) -> int:
    """Run a worker until it ends or this process is told to; returns its exit code."""
    told = threading.Event()
    for stop in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stop, lambda *_: told.set())
    command = [sys.executable, "-m", "prefect", "worker", "start", *options]
    worker = subprocess.Popen(command)
    while worker.poll() is None and not told.wait(_LOOK_EVERY_S):
        pass
    if worker.poll() is None:
        _end_runs(worker.pid)
        worker.terminate()
    return worker.wait()


def _end_runs(worker: int) -> None:
    """Ask every run of a worker to end, also one that it takes meanwhile, and wait until they have."""
    deadline, asked = time.monotonic() + GRACE_S, set[int]()
    while (runs := _children(worker)) and time.monotonic() < deadline:
        for run in runs - asked:
            with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                os.kill(run, signal.SIGTERM)
        asked |= runs
        time.sleep(_LOOK_EVERY_S)


def _children(parent: int) -> set[int]:
    """Processes that a process has started and that still run."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, of, *_ = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        if int(of) == parent and state != "Z":
            found.add(int(stat.parent.name))
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
