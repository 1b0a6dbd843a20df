"""What later stages take of an ingest, and when an ingest makes it again."""

import shutil
from pathlib import Path

import pytest

from flows.collect import collect
from flows.evaluate import evaluate
from flows.ingest import ingest
from tasks import artifact, config
from tasks.errors import ArtifactError
from tests.small_collection import ingest_small, write_documents


def test_nothing_is_asked_while_an_ingest_is_under_way(tmp_path: Path, documents: Path) -> None:
    root = str(tmp_path / "store")
    ingest_small(root, documents)
    old = artifact.load_ref(root, "index")
    (tmp_path / "more").mkdir()
    more = write_documents(tmp_path / "more")
    (more / "pdfs" / "pump.pdf").rename(more / "pdfs" / "another.pdf")
    ingest_small(root, more)
    artifact.save_ref(root, "index", old)
    server = config.Server(base_url=["http://127.0.0.1:9/v1"], model="nobody")
    with pytest.raises(ArtifactError, match="holds index of other pages than the newest"):
        collect(config.CollectRun(storage=root, server=server))
    with pytest.raises(ArtifactError, match="holds index of other pages than the newest"):
        evaluate(config.EvaluateRun(storage=root, server=server))


def test_a_home_folder_is_the_folder_that_it_stands_for(
    tmp_path: Path, documents: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").symlink_to(documents)
    root = str(tmp_path / "store")
    settings = config.IngestRun(
        storage=root, ingest=config.Ingest(documents="~/mine/pdfs", questions="~/mine/questions.jsonl")
    )
    ingest(settings)
    assert all(run.cached for run in ingest(settings))
    pages = artifact.load_ref(root, "pages").rows
    (tmp_path / "mine").unlink()
    shutil.copytree(documents, tmp_path / "mine")
    next((tmp_path / "mine" / "pdfs").glob("*.pdf")).unlink()
    ingest(settings)
    assert artifact.load_ref(root, "pages").rows < pages
