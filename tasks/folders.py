"""Folders of this machine that belong to no storage root: what DRAG keeps between commands, and scratch as large as a model."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tasks import locks, storage
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
def scratch(name: str, parent: Path | None = None) -> Iterator[Path]:
    """A new empty folder for as long as the block; those of that name that killed processes left are removed.

    Whoever uses one holds the lock of a file beside it.

    Args:
        parent: folder that it is made below; the system's for temporary files when None.

    Raises:
        ConfigError, StorageError: as `make`.
    """
    parent = make(parent or Path(tempfile.gettempdir()))
    for old in parent.glob(f"drag-{name}-*/lock"):
        if locks.is_free(old):
            shutil.rmtree(old.parent, ignore_errors=True)
    with contextlib.ExitStack() as held:
        with storage.local_errors(str(parent), "written to"):
            whole = Path(tempfile.mkdtemp(prefix=f"drag-{name}-", dir=parent))
            lock = held.enter_context((whole / "new").open("wb"))
            held.callback(shutil.rmtree, whole, ignore_errors=True)  # while the lock is held
            locks.hold(lock)
            (whole / "new").rename(whole / "lock")  # nobody finds it before it is held
            folder = make(whole / "files")
        yield folder
