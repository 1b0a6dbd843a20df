"""Work in processes of its own: what such a process runs ends with whoever started it."""

import os
import subprocess
import sys
from pathlib import Path

from tasks import processes

MAIN = """
import os, signal, subprocess, sys, time
from pathlib import Path
from tasks.processes import new_pool

def work(flag):
    with subprocess.Popen(["sleep", "3600"]):
        Path(flag).touch()

if __name__ == "__main__":
    new_pool(1).submit(work, sys.argv[1])
    while not os.path.exists(sys.argv[1]):
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_nothing_outlives_a_killed_run(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(MAIN)
    # All inherit the pipe: it is closed, and `run` returns, only when the last process that holds it has ended.
    done = subprocess.run(
        [sys.executable, str(tmp_path / "main.py"), str(tmp_path / "flag")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(Path(processes.__file__).parents[1])},
        timeout=60,
    )
    assert done.returncode == -9
    assert (tmp_path / "flag").exists()
