"""The watchdog: nothing that was started outlives its starter."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tasks import watchdog

# a program that starts a worker of its own, writes both process ids, and waits
PROGRAM = """
import os, subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(sys.argv[1], "w").write(f"{os.getpid()} {worker.pid}\\n")
time.sleep(600)
"""


def _pids(path: Path) -> list[int]:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if path.exists() and path.read_text().endswith("\n"):
            return [int(word) for word in path.read_text().split()]
        time.sleep(0.05)
    raise AssertionError("the program did not start")


def _alive(pid: int) -> bool:
    try:
        return _stat(pid)[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _stat(pid: int) -> list[str]:
    """What the system says of a process: its state, its parent, and more."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _all_end(pids: list[int]) -> bool:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if not any(_alive(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def test_stop_ends_the_program_and_its_workers(tmp_path: Path) -> None:
    process = watchdog.start([sys.executable, "-c", PROGRAM, str(tmp_path / "pids")], output=subprocess.DEVNULL)
    pids = _pids(tmp_path / "pids")
    assert watchdog.stop(process) == 128 + signal.SIGTERM
    assert _all_end(pids)
    assert watchdog.stop(process) == 128 + signal.SIGTERM


@pytest.mark.parametrize("victim", ["starter", "watchdog", "program"])
def test_kill_9_leaves_nothing_behind(tmp_path: Path, victim: str) -> None:
    starter = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, subprocess, time; from tasks import watchdog;"
            "watchdog.start([sys.executable, '-c', sys.argv[1], sys.argv[2]], output=subprocess.DEVNULL); time.sleep(600)",
            PROGRAM,
            str(tmp_path / "pids"),
        ]
    )
    try:
        pids = _pids(tmp_path / "pids")
        assert all(_alive(pid) for pid in pids)
        of_victim = {"starter": starter.pid, "watchdog": int(_stat(pids[0])[1]), "program": pids[0]}
        os.kill(of_victim[victim], signal.SIGKILL)
        assert _all_end(pids)
    finally:
        starter.kill()
        starter.wait()


def test_the_exit_code_is_the_commands() -> None:
    process = watchdog.start([sys.executable, "-c", "raise SystemExit(7)"], output=subprocess.DEVNULL)
    assert process.wait() == 7


def test_a_program_in_a_session_of_its_own_dies_with_its_parent(tmp_path: Path) -> None:
    there = str(tmp_path / "there")
    child = (
        f"import time; from tasks import watchdog; watchdog.die_with_parent(); open({there!r}, 'w'); time.sleep(600)"
    )
    starts_it = PROGRAM.replace(
        '[sys.executable, "-c", "import time; time.sleep(600)"]',
        f'[sys.executable, "-c", {child!r}], start_new_session=True',
    )
    parent = subprocess.Popen([sys.executable, "-c", starts_it, str(tmp_path / "pids")])
    pids = _pids(tmp_path / "pids")
    deadline = time.monotonic() + 60
    while not Path(there).exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    assert _all_end(pids)
