"""The folder that an export goes to: what an earlier export of the same left there goes, and nothing that others put there.

export.json in it names the export's files. It is written before they are, so that what a killed export wrote is known too:

{"what": "results", "files": ["comparison.jsonl", "provenance.json", "results-base.jsonl"], "whole": true}
"""

from pathlib import Path

from pydantic import BaseModel, ValidationError

from tasks import storage
from tasks.errors import ConfigError, InputError

_NAME = "export.json"


class _Export(BaseModel):
    what: str
    files: list[str]
    whole: bool  # False while it is being written


def _earlier(target: str) -> _Export | None:
    """The export that lies in a folder, if there is one.

    Raises:
        InputError: its export.json is not what an export writes.
    """
    uri = storage.join(target, _NAME)
    if not storage.is_file(uri):
        return None
    try:
        return _Export.model_validate_json(storage.read_bytes(uri))
    except ValidationError as error:
        raise InputError("is not what an export writes; move it away", file=uri) from error


def put(folder: Path, target: str, what: str) -> None:
    """Store a local folder as the export of `what` in the folder, or at the s3:// prefix, `target`.

    Killed in between, it leaves a part of the new export, never one of both, and the next export of the same replaces it.

    Raises:
        ConfigError: an export of something else lies there, or a file of this one's name that no export wrote.
        InputError: its export.json is not what an export writes.
    """
    earlier = _earlier(target) or _Export(what=what, files=[], whole=True)
    if earlier.what != what:
        raise ConfigError(f"{target} holds an export of {earlier.what}: name another folder, or delete that one")
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    there = {storage.relative(file, target): file for file in storage.iter_files(target, closed=[])}
    if foreign := sorted(files & there.keys() - set(earlier.files)):
        raise ConfigError(
            f"{target} holds {foreign[0]}, and no export.json says that an export wrote it: name an empty folder, or delete it"
        )
    _write(target, what, files.union(earlier.files), whole=False)
    for name in sorted(there.keys() & set(earlier.files)):  # what is there, so no path that leads out of the folder
        storage.delete(there[name])
    storage.upload_folder(folder, target)
    _write(target, what, files, whole=True)


def _write(target: str, what: str, files: set[str], *, whole: bool) -> None:
    said = _Export(what=what, files=sorted(files), whole=whole)
    storage.write_bytes(storage.join(target, _NAME), said.model_dump_json(indent=1).encode())


def refuse_cut_off(source: str) -> None:
    """Refuse a folder, a file of one, or a table's folder in one, whose export was killed before all its files were there.

    Raises:
        InputError: it was.
    """
    folder = source
    for _ in range(3):
        if not folder or folder.endswith(":/"):  # above a bucket, or the root of all folders
            return
        try:
            found = _earlier(folder)
        except InputError:  # another program's, which may call a file so
            found = None
        if found and not found.whole:
            raise InputError("its export did not come to its end: export it again", file=folder)
        folder = folder.rpartition("/")[0]
