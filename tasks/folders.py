"""Folders of this machine that belong to no storage root: what DRAG keeps between commands, and scratch as large as a model."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tasks import storage
from tasks.errors import ConfigError


def cache_folder() -> Path:
    """Where models and downloaded artifacts are kept between runs: DRAG_CACHE, by default ~/.cache/drag.

    Raises:
        ConfigError: it is not set, and there is no home folder.
    """
    return _folder("DRAG_CACHE", ".cache/drag")


def home_folder() -> Path:
    """Where the Prefect server that the command line brings along keeps its database: DRAG_HOME, by default ~/.drag.

    Raises:
        ConfigError: it is not set, and there is no home folder.
    """
    return _folder("DRAG_HOME", ".drag")


def _folder(variable: str, below_home: str) -> Path:
    try:
        return Path(os.environ.get(variable) or f"~/{below_home}").expanduser()
    except RuntimeError as error:
        raise ConfigError(f"this user has no home folder: set {variable} to a folder that may be written") from error


def make(folder: Path) -> Path:
    """The folder, made with its parents where it is not there.

    Raises:
        ConfigError: it may not be made; the message names it.
        StorageError: its disk fails.
    """
    with storage.local_errors(str(folder), "made"):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def scratch(parent: Path, name: str) -> Iterator[Path]:
    """A new folder below `parent` for as long as the block; those of that name that killed processes left are removed.

    Whoever uses one holds the lock of a file in it, which the system frees when that process ends.

    Raises:
        ConfigError, StorageError: as `make`.
    """
    with contextlib.ExitStack() as held:
        with (make(parent) / f"{name}.lock").open(
            "wb"
        ) as alone:  # no folder is taken for a dead one before its lock is held
            fcntl.flock(alone, fcntl.LOCK_EX)
            for old in parent.glob(f"{name}-*/.lock"):
                if _is_free(old):
                    shutil.rmtree(old.parent, ignore_errors=True)
            folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=parent))
            fcntl.flock(held.enter_context((folder / ".lock").open("wb")), fcntl.LOCK_EX)
            held.callback(shutil.rmtree, folder, ignore_errors=True)  # while the lock is held
        yield folder


def _is_free(lock: Path) -> bool:
    try:
        with lock.open("r+b") as file:  # a network share locks what is open for writing alone
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, FileNotFoundError):  # held, or gone meanwhile
        return False
    return True
