"""Where an export goes: the newest replaces what an earlier one left, whole or killed, and nothing of anybody else's."""

import subprocess
import sys
from pathlib import Path

import pytest

from tasks import storage
from tasks.errors import ConfigError, InputError
from tasks.exchange.target import put, refuse_cut_off


def _made(folder: Path, *files: str) -> Path:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{folder.name} {name}")
    return folder


def _there(target: str) -> dict[str, str]:
    files = {storage.relative(uri, target): storage.read_bytes(uri).decode() for uri in storage.iter_files(target)}
    return {name: content for name, content in files.items() if name != "export.json"}


def test_an_export_leaves_nothing_of_the_one_before_and_all_of_others(storage_root: str, tmp_path: Path) -> None:
    target = storage.join(storage_root, "out")
    storage.write_bytes(storage.join(target, "notes.txt"), b"mine")
    put(_made(tmp_path / "old", "pairs/train.parquet", "pairs/test.parquet", "README.md"), target, "processed")
    storage.write_bytes(storage.join(target, "pairs/mine.parquet"), b"mine")
    put(_made(tmp_path / "new", "pairs/train.parquet", "stats.json"), target, "processed")
    assert _there(target) == {
        "notes.txt": "mine",
        "pairs/mine.parquet": "mine",
        "pairs/train.parquet": "new pairs/train.parquet",
        "stats.json": "new stats.json",
    }
    refuse_cut_off(target)
    refuse_cut_off(storage.join(target, "stats.json"))


def test_what_no_export_of_the_same_wrote_is_neither_replaced_nor_deleted(storage_root: str, tmp_path: Path) -> None:
    target, made = storage.join(storage_root, "out"), _made(tmp_path / "made", "pairs.jsonl", "stats.json")
    storage.write_bytes(storage.join(target, "stats.json"), b"mine")
    with pytest.raises(ConfigError, match=r"holds stats\.json.*name an empty folder"):
        put(made, target, "processed")
    assert _there(target) == {"stats.json": "mine"}
    storage.delete(target)
    put(made, target, "processed")
    with pytest.raises(ConfigError, match="holds an export of processed: name another folder"):
        put(_made(tmp_path / "other", "mined.jsonl"), target, "mined")
    assert set(_there(target)) == {"pairs.jsonl", "stats.json"}


def test_a_file_that_another_program_calls_so_keeps_nothing_from_being_imported(
    storage_root: str, tmp_path: Path
) -> None:
    target = storage.join(storage_root, "out")
    storage.write_bytes(storage.join(target, "export.json"), b'{"settings": 1}')
    refuse_cut_off(target)
    with pytest.raises(InputError, match="move it away"):
        put(_made(tmp_path / "made", "mined.jsonl"), target, "mined")


def test_names_that_lead_out_of_the_folder_delete_nothing(storage_root: str, tmp_path: Path) -> None:
    target, beside = storage.join(storage_root, "out"), storage.join(storage_root, "mine")
    storage.write_bytes(beside, b"mine")
    named = b'{"what": "mined", "files": ["../mine", "/mine", ""], "whole": true}'
    storage.write_bytes(storage.join(target, "export.json"), named)
    put(_made(tmp_path / "made", "mined.jsonl"), target, "mined")
    assert storage.read_bytes(beside) == b"mine"
    assert set(_there(target)) == {"mined.jsonl"}
    storage.write_bytes(storage.join(target, "export.json"), b'{"name": "my app"}')
    with pytest.raises(InputError, match=r"export\.json: is not what an export writes"):
        put(tmp_path / "made", target, "mined")


_KILLED = """
import os, sys
from pathlib import Path
from tasks import storage
from tasks.exchange.target import put

name, left = sys.argv[3], int(sys.argv[4])
done = getattr(storage, name)

def until_killed(*given):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), 9)
    return done(*given)

setattr(storage, name, until_killed)
put(Path(sys.argv[1]), sys.argv[2], "processed")
"""


@pytest.mark.parametrize(("step", "left"), [("delete", 1), ("_write_file", 0), ("_write_file", 1), ("write_bytes", 1)])
@pytest.mark.parametrize("storage_root", ["local", "s3"], indirect=True)
def test_a_killed_export_is_never_a_mixture_and_the_next_one_is_whole(
    storage_root: str, tmp_path: Path, step: str, left: int
) -> None:
    target = storage.join(storage_root, "out")
    put(_made(tmp_path / "old", "a", "b", "c"), target, "processed")
    storage.write_bytes(storage.join(target, "notes.txt"), b"mine")
    new = _made(tmp_path / "new", "b", "d", "e")
    done = subprocess.run([sys.executable, "-c", _KILLED, str(new), target, step, str(left)])
    assert done.returncode == -9
    made_by = {content.partition(" ")[0] for name, content in _there(target).items() if name != "notes.txt"}
    assert len(made_by) < 2
    for source in ("", "/x.jsonl", "/sft_best", "/sft_best/train.parquet"):
        with pytest.raises(InputError, match="did not come to its end: export it again"):
            refuse_cut_off(target + source)
    put(_made(tmp_path / "newest", "e"), target, "processed")
    assert _there(target) == {"notes.txt": "mine", "e": "newest e"}
    refuse_cut_off(target)
