"""A package that decides what a stage makes was upgraded: the stage is done again, and those before it are not."""

import importlib.metadata
from pathlib import Path

import pytest

from tests.small_collection import ingest_small


@pytest.mark.parametrize(
    ("package", "kept"), [("pymupdf", set()), ("tantivy", {"read documents", "read scans", "read questions"})]
)
def test_an_upgrade_makes_again_what_it_changes(
    package: str, kept: set[str], tmp_path: Path, documents: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ingest_small(str(tmp_path), documents)
    installed = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "99.0" if name == package else installed(name))
    assert {run.stage for run in ingest_small(str(tmp_path), documents) if run.cached} == kept
    assert all(run.cached for run in ingest_small(str(tmp_path), documents))
