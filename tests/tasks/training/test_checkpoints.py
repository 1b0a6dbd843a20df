"""Checkpoints: only whole ones of the same training count, here and on storage."""

from pathlib import Path

from tasks import storage
from tasks.training import checkpoints
from tasks.training.checkpoints import fetch, latest


def write(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "weights").write_text(f"weights at {step}")
    (path / "state").write_text("state")
    return path


def seal(folder: Path, training: str, uri: str | None) -> None:
    """As one machine does."""
    checkpoints.clear(folder, uri)
    checkpoints.seal(folder, training, uri, checkpoints.copy(folder, uri))


def test_one_that_was_cut_off_is_ignored(tmp_path: Path) -> None:
    assert latest(tmp_path, "a") is None
    seal(write(tmp_path, 5), "a", None)
    seal(write(tmp_path, 10), "a", None)
    write(tmp_path, 15)  # killed before it was sealed
    assert latest(tmp_path, "a") == tmp_path / "checkpoint-10"
    (tmp_path / "checkpoint-10" / "weights").write_text("weig")
    assert latest(tmp_path, "a") == tmp_path / "checkpoint-5"
    (tmp_path / "checkpoint-5" / "state").unlink()
    assert latest(tmp_path, "a") is None


def test_another_training_s_is_ignored(tmp_path: Path) -> None:
    seal(write(tmp_path, 5), "a", None)
    assert latest(tmp_path, "b") is None


def test_another_machine_finds_the_newest(tmp_path: Path, storage_root: str) -> None:
    uri = storage.join(storage_root, "checkpoints")
    here, there = tmp_path / "here", tmp_path / "there"
    fetch(uri, there, "a")
    assert latest(there, "a") is None
    seal(write(here, 5), "a", uri)
    seal(write(here, 10), "a", uri)
    assert {storage.relative(file, uri).split("/")[0] for file in storage.iter_files(uri)} == {"checkpoint-10"}
    fetch(uri, there, "a")
    assert latest(there, "a") == there / "checkpoint-10"
    assert (there / "checkpoint-10" / "weights").read_text() == "weights at 10"


def test_a_newer_copy_wins_over_an_older_one_of_its_own_and_an_older_does_not(
    tmp_path: Path, storage_root: str
) -> None:
    uri = storage.join(storage_root, "checkpoints")
    here, there = tmp_path / "here", tmp_path / "there"
    seal(write(there, 5), "a", None)
    seal(write(here, 10), "a", uri)
    fetch(uri, there, "a")
    assert latest(there, "a") == there / "checkpoint-10"
    seal(write(there, 15), "a", None)
    fetch(uri, there, "a")
    assert latest(there, "a") == there / "checkpoint-15"


def test_a_copy_that_was_cut_off_is_ignored(tmp_path: Path, storage_root: str) -> None:
    uri = storage.join(storage_root, "checkpoints")
    seal(write(tmp_path / "here", 5), "a", uri)
    storage.delete(storage.join(uri, "checkpoint-5", "weights"))
    fetch(uri, tmp_path / "there", "a")
    assert latest(tmp_path / "there", "a") is None
