"""Folders of this machine: where they are, what is said when they cannot be, and scratch that a killed process has left."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tasks import folders, locks
from tasks.errors import ConfigError


def test_they_are_where_the_environment_says_or_below_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    for variable, folder, below in (
        ("DRAG_CACHE", folders.cache_folder, ".cache/drag"),
        ("DRAG_HOME", folders.home_folder, ".drag"),
    ):
        monkeypatch.delenv(variable, raising=False)
        assert folder() == Path("/home/somebody") / below
        monkeypatch.setenv(variable, "~/elsewhere")
        assert folder() == Path("/home/somebody/elsewhere")


_NOBODY = """
import os
from tasks import folders, locks
from tasks.errors import ConfigError
del os.environ["HOME"]
os.environ.pop("DRAG_HOME", None)
if os.geteuid() == 0:
    os.setuid(54321)
try:
    print(folders.home_folder())
except ConfigError as error:
    print(error)
os.environ["DRAG_HOME"] = "/data"
print(folders.home_folder())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming a user whom the machine does not know takes root")
def test_without_a_home_folder_one_is_asked_for() -> None:
    done = subprocess.run([sys.executable, "-c", _NOBODY], capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "this user has no home folder: set DRAG_HOME to a folder that may be written",
        "/data",
    ], done.stderr


def test_what_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file/below cannot be made: Not a directory"):
        folders.make(tmp_path / "file" / "below")


_HOLD = """
import sys, time
from pathlib import Path
from tasks import folders
with folders.scratch("merged", Path(sys.argv[1])) as folder:
    (folder / "model").mkdir()
    (folder / "model" / "weights").write_bytes(b"w" * 1000)
    print(folder, flush=True)
    time.sleep(600)
"""


def _holder(parent: Path) -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen([sys.executable, "-c", _HOLD, str(parent)], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    return process, Path(process.stdout.readline().strip())


def test_scratch_goes_with_its_block_and_what_a_killed_process_left_goes_with_the_next(tmp_path: Path) -> None:
    lives, kept = _holder(tmp_path / "work")
    dead, left = _holder(tmp_path / "work")
    try:
        dead.send_signal(signal.SIGKILL)
        dead.wait(60)
        assert left.is_dir()
        with folders.scratch("merged", tmp_path / "work") as folder:
            assert not left.exists()
            assert (kept / "model" / "weights").exists(), "its process lives"
            assert list(folder.iterdir()) == []
        assert [path.parent for path in (tmp_path / "work").glob("*/files")] == [kept.parent]
    finally:
        for process in (lives, dead):
            process.kill()
            process.wait(60)


def test_where_no_lock_can_be_had_nothing_is_taken_for_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(file: object, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", none)
    with folders.scratch("merged", tmp_path) as kept, folders.scratch("merged", tmp_path) as other:
        assert kept.is_dir()
        assert other.is_dir()
    assert list(tmp_path.iterdir()) == []


# stages that are killed when they have made half of what may be large
_KILLED = {
    "jsonl": """
def lines():
    yield "sft.jsonl", {"question": "Why?", "question_id": "q", "query": "because"}
    die()

jsonl.write(lines(), ["sft.jsonl"], "made", {})
""",
    "index": """
pages = artifact.write_table(artifact.table_of([], "pages/2"), "pages.parquet", "pages/2", {})
tantivy_engine.build = lambda pages, folder: die()
build_index(pages, config.Index(), "made")
""",
    "download": """
artifact.exists = lambda of: True
storage.download_folder = lambda uri, folder: die()
artifact.fetch_folder(artifact.Artifact("s3://bucket/index", "ab" * 32, 1, "index/1"))
""",
}
_DIE = """
import os, signal
from tasks import artifact, config, jsonl, storage
from tasks.search import tantivy_engine
from tasks.search.index import build_index

def die():
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("name", _KILLED)
def test_a_stage_that_is_killed_leaves_what_the_next_one_removes(tmp_path: Path, name: str) -> None:
    env = {**os.environ, "TMPDIR": str(tmp_path), "DRAG_CACHE": str(tmp_path), "PYTHONPATH": os.getcwd()}
    killed = subprocess.run([sys.executable, "-c", _DIE + _KILLED[name]], env=env, cwd=tmp_path, check=False)
    assert killed.returncode == -signal.SIGKILL
    parent = tmp_path / "folders" if name == "download" else tmp_path
    (left,) = parent.glob("drag-*/files")
    with folders.scratch(name, parent):
        assert not left.parent.exists()
