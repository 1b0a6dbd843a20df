"""Locks of files, which the system frees when the process that holds them ends, however it ends."""

import contextlib
import fcntl
from pathlib import Path
from typing import IO


def hold(file: IO[bytes]) -> None:
    """Hold a file's lock until it is closed. On a share that knows no locks nothing is held, and nothing there `is_free`."""
    with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX)


def is_free(path: Path) -> bool:
    """Whether nobody holds a file's lock any more; False where that cannot be known."""
    try:
        with path.open("r+b") as file:  # a network share locks what is open for writing alone
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held, gone meanwhile, somebody else's, or on a share that knows no locks
        return False
    return True
