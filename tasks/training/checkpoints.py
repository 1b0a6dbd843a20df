"""Checkpoints that a killed training goes on from, on this machine or another.

A checkpoint counts only once its marker is there, which is written last and names every file with its hash: one that a kill
cut off in writing is ignored. The marker also names the training (a hash of its inputs and settings), so that another
training's checkpoint is never taken for this one's. Where several machines train, each copies what its processes wrote.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from tasks import storage

_MARKER = "complete.json"
_PREFIX = "checkpoint-"


def clear(folder: Path, uri: str | None) -> None:
    """Remove what an earlier run may have left below `uri` at the place of this checkpoint, its marker above all."""
    if uri:
        storage.delete(storage.join(uri, folder.name))


def copy(folder: Path, uri: str | None) -> dict[str, str]:
    """Copy what this machine wrote of a checkpoint below `uri`, if one is given; returns name → hash of these files."""
    if uri:
        storage.upload_folder(folder, storage.join(uri, folder.name))
    return _hashes(folder)


def seal(folder: Path, training: str, uri: str | None, files: Mapping[str, str]) -> None:
    """Mark a checkpoint that is written whole, here and below `uri` where other machines find it; older copies go.

    Args:
        folder: .../checkpoint-STEP.
        training: what it is a checkpoint of.
        uri: s3:// folder of all checkpoints of this training, or None when they stay on this machine.
        files: name → hash of all its files, as `copy` returned them on each machine.
    """
    marker = json.dumps({"training": training, "files": files}).encode()
    if uri:
        whole = storage.join(uri, folder.name)
        storage.write_bytes(storage.join(whole, _MARKER), marker)
        for file in storage.iter_files(uri):
            if not file.startswith(whole + "/"):
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
        shutil.rmtree(folder / there, ignore_errors=True)  # this machine's part, or one that a kill cut off
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
        path.relative_to(folder).as_posix(): storage.file_sha256(path).hex()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != _MARKER
    }
