"""A storage root that was moved, copied, or is known by another name: nothing is done again, and nothing needs the old place."""

import datetime
import shutil
from pathlib import Path

import pytest

from flows.collect import collect
from flows.evaluate import evaluate
from flows.prepare import prepare
from flows.reparse import reparse
from tasks import artifact, config, nights, refs, storage
from tasks.artifact import Artifact
from tasks.stages import StageRun
from tests.model_server import ModelServer
from tests.small_collection import ingest_small, searcher

AGENT = config.Agent(protocol="tags", max_iterations=3)
NIGHT = datetime.date(2026, 11, 24)


def _all_stages(root: str, documents: Path, url: str) -> list[StageRun]:
    """All but training: an ingest, a collection, one of a night that is then read again, training sets and a measurement."""
    asking = {"storage": root, "agent": AGENT, "server": config.Server(base_url=url, model="base", concurrency=4)}
    night = config.Collect(split="all", limit=2, dt=NIGHT.isoformat(), order="new-and-hardest")
    runs = ingest_small(root, documents)
    runs += collect(config.CollectRun(**asking, collect=config.Collect(split="all", limit=3)))
    runs += collect(config.CollectRun(**asking, collect=night))
    runs += reparse(config.ReparseRun(storage=root, nights=config.Nights(since=NIGHT)))
    runs += prepare(config.PrepareRun(storage=root, agent=AGENT, format=config.Format(split="all")))
    variants = [config.Variant(name=name, model=name) for name in ("question", "base")]
    measured = config.EvaluateRun(**asking, evaluate=config.Evaluate(split="all", limit=2), variants=variants)
    return runs + evaluate(measured)


def _referred_to(root: str) -> list[Artifact]:
    found = [refs.load_ref(root, name) for name in refs.ref_names(root)]
    return found + list(nights.between(root, ["trajectories", "scores"], None, None).values())


@pytest.mark.parametrize("storage_root", ["local", "seaweedfs"], indirect=True)
def test_a_copy_stands_for_itself(storage_root: str, documents: Path, tmp_path: Path) -> None:
    copy = storage_root + "-copy"
    with ModelServer(searcher) as server:
        first = _all_stages(storage_root, documents, server.url)
        assert not any(run.cached for run in first)
        storage.download_folder(storage_root, tmp_path / "on-its-way")
        storage.upload_folder(tmp_path / "on-its-way", copy)
        calls = server.calls
        for original in ("there", "gone"):
            if original == "gone":
                storage.delete(storage_root)
            again = _all_stages(copy, documents, server.url)
            assert [run.stage for run in again if not run.cached] == []
            made = [stored for run in again for stored in run.artifacts.values()] + _referred_to(copy)
            assert [stored.uri for stored in made if not stored.uri.startswith(copy + "/")] == []
            assert all(map(artifact.exists, made))
            assert [run.artifacts.keys() for run in again] == [run.artifacts.keys() for run in first]
        assert server.calls == calls


def test_what_lies_below_a_root_does_not_name_it(tmp_path: Path, documents: Path) -> None:
    root = tmp_path / "some-root"
    with ModelServer(searcher) as server:
        _all_stages(str(root), documents, server.url)
    assert [file for file in root.rglob("*") if file.is_file() and str(root).encode() in file.read_bytes()] == []


@pytest.mark.parametrize("how", ["renamed", "linked", "trailing slash"])
def test_a_local_root_under_another_name(tmp_path: Path, documents: Path, how: str) -> None:
    """With its documents in it, as infra/README.md has them."""
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(documents, old / "input")
    ingest_small(str(old), old / "input")
    if how == "renamed":
        old.rename(new)
    elif how == "linked":
        new.symlink_to(old)
    here = old if how == "trailing slash" else new
    again = ingest_small(f"{old}/" if how == "trailing slash" else str(new), here / "input")
    assert all(run.cached for run in again)
    assert all(stored.uri.startswith(f"{here}/") for run in again for stored in run.artifacts.values())
