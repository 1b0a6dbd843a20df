"""Checkpoints that a killed training goes on from, on this machine or another.

A checkpoint counts only once its marker is there, which is written last and names every file with its hash: one that a kill
cut off in writing is ignored. The marker also names the training (a hash of its inputs and settings), so that another
training's checkpoint is never taken for this one's.
"""

import hashlib
import json
from pathlib import Path

from tasks import storage

_MARKER = "complete.json"
_PREFIX = "checkpoint-"


def seal(folder: Path, training: str, uri: str | None) -> None:
    """Mark a checkpoint that is written whole, and copy it below `uri` where other machines find it; older copies go.

    Args:
        folder: .../checkpoint-STEP.
        training: what it is a checkpoint of.
        uri: s3:// folder of all checkpoints of this training, or None to keep them here alone.
    """
    marker = json.dumps({"training": training, "files": _hashes(folder)}).encode()
    if uri:
        copy = storage.join(uri, folder.name)
        storage.delete(copy)
        storage.upload_folder(folder, copy)
        storage.write_bytes(storage.join(copy, _MARKER), marker)
        for file in storage.iter_files(uri):
            if not file.startswith(copy + "/"):
                storage.delete(file)
    storage.write_bytes(str(folder / _MARKER), marker)


def latest(folder: Path, training: str) -> Path | None:
    """The whole checkpoint of this training with the most steps below a local folder, if there is one."""
    found = sorted(folder.glob(f"{_PREFIX}*"), key=lambda path: _step(path.name), reverse=True)
    return next((path for path in found if _is_whole(path, training)), None)


def fetch(uri: str, folder: Path, training: str) -> None:
    """Bring the checkpoint with the most steps below `uri` into a local folder that has none with as many."""
    marked = {file.rsplit("/", 2)[1] for file in storage.iter_files(uri) if file.endswith(f"/{_MARKER}")}
    here = latest(folder, training)
    there = max(marked, key=_step, default=None)
    if there and (here is None or _step(there) > _step(here.name)):
        storage.download_folder(storage.join(uri, there), folder / there)


def _step(name: str) -> int:
    number = name.removeprefix(_PREFIX)
    return int(number) if number.isdigit() else -1


def _is_whole(folder: Path, training: str) -> bool:
    marker = folder / _MARKER
    if not marker.is_file():
        return False
    content = json.loads(marker.read_bytes())
    return content["training"] == training and content["files"] == _hashes(folder)


def _hashes(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != _MARKER
    }
