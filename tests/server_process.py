"""tests/model_server.py as a process that dies, in the place of vLLM: started, watched and ended as vLLM is."""

import contextlib
import json
import os
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tasks import watchdog
from tasks.errors import ServerError
from tasks.serve import Served
from tasks.server_api import check_health

ROOT = Path(__file__).parents[1]


@contextlib.contextmanager
def server_process(log: Path, port: int, *flags: str) -> Iterator[Served]:
    """A model server on `port` for as long as the block runs, or until it ends as the flags say."""
    command = [sys.executable, str(ROOT / "tests" / "model_server.py"), "--port", str(port), *flags]
    with log.open("wb") as output:
        process = watchdog.start(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, output=output)
    served = Served(f"http://127.0.0.1:{port}/v1", process, log)
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(ServerError):
                check_health(served.base_url)
                break
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, "the model server did not start"
            time.sleep(0.05)
        yield served
    finally:
        watchdog.stop(process)


def counts(base_url: str) -> dict[str, Any]:
    """What the server there tells of itself: calls, most_in_flight, pid."""
    with urllib.request.urlopen(base_url.removesuffix("/v1") + "/counts", timeout=30) as reply:
        return json.load(reply)
