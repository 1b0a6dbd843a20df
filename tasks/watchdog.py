"""Run a program that must not outlive whoever started it: python -m tasks.watchdog PROGRAM [ARG ...]

The starter holds the write end of this process's standard input. When it dies, however it dies (kill -9 included), that
pipe closes; the watchdog then ends the program and all it started. Without this, a killed flow would leave a vLLM engine
holding the GPU, or a trainer writing to the checkpoints that the next run reads. The watchdog itself may be killed as well,
so it is watched in the same way, by the process that leads the program's group.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO

GRACE_S = 15.0
_PARENT_EVERY_S = 0.5


def start(
    command: Sequence[str], *, env: Mapping[str, str] | None = None, output: IO[bytes] | int
) -> subprocess.Popen[bytes]:
    """Start `command` under a watchdog; its output and errors go to `output`.

    Returns the watchdog's process: its exit code is the command's. End it with `stop`.
    """
    return subprocess.Popen(
        [sys.executable, "-m", "tasks.watchdog", *command],
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=dict(env) if env is not None else None,
        start_new_session=True,  # Ctrl-C reaches the starter alone, which ends us in its own order
    )


def stop(process: subprocess.Popen[bytes]) -> int:
    """End the command and all it started, politely first; returns its exit code. Stopping twice is no error."""
    if process.stdin and not process.stdin.closed:
        process.stdin.close()
    return process.wait()


def die_with_parent() -> None:
    """End this process soon after its parent, where the parent is no watchdog of ours but may be killed all the same."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_EVERY_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(command: list[str]) -> int:
    """Run the command in a process group of its own until it ends or standard input closes; returns its exit code."""
    group = _group_that_ends_with_us()
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=group)

    def end_when_asked() -> None:
        while os.read(0, 1024):
            pass
        child.terminate()
        try:
            child.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            child.kill()

    threading.Thread(target=end_when_asked, daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    code = child.wait()
    # A program that crashed or was killed leaves its workers behind, in its group.
    os.killpg(group, signal.SIGKILL)
    os.waitpid(group, 0)
    return code if code >= 0 else 128 - code


def _group_that_ends_with_us() -> int:
    """A new process group, killed as soon as this process is no more: its leader waits for a pipe that is open here alone.

    At once, not politely: who started this goes on, and starts the program again on the same port and GPU.
    """
    ends_with_us, held = os.pipe()
    leader = os.fork()
    if leader:
        os.close(ends_with_us)
        os.setpgid(leader, leader)
        return leader
    os.close(held)
    for asked in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # a program may end its whole group politely
        signal.signal(asked, signal.SIG_IGN)
    os.read(ends_with_us, 1)
    os.killpg(0, signal.SIGKILL)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
