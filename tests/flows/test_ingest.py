"""What later stages take of an ingest, and when an ingest makes it again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from flows.collect import collect
from flows.evaluate import evaluate
from flows.infer import infer
from flows.ingest import ingest
from flows.mine import mine
from tasks import artifact, config, refs, storage
from tasks.errors import ArtifactError, ConfigError
from tests.model_server import ModelServer, Reply
from tests.small_collection import TOPICS, ingest_small, write_documents

NOBODY = config.Server(base_url=["http://127.0.0.1:9/v1"], model="nobody")


def _ocr_file(path: Path, *files: str) -> str:
    """A row for the second page of each."""
    rows = [{"file": file, "page_number": 2, "total_pages": 2, "text": f"Gewicht {file}"} for file in files]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_nothing_is_asked_while_an_ingest_is_under_way(tmp_path: Path, documents: Path) -> None:
    root = str(tmp_path / "store")
    ingest_small(root, documents)
    old = refs.load_ref(root, "index")
    (tmp_path / "more").mkdir()
    more = write_documents(tmp_path / "more")
    (more / "pdfs" / "pump.pdf").rename(more / "pdfs" / "another.pdf")
    ingest_small(root, more)
    refs.save_ref(root, "index", old)
    with pytest.raises(ArtifactError, match="holds index of other pages than the newest"):
        collect(config.CollectRun(storage=root, server=NOBODY))
    with pytest.raises(ArtifactError, match="holds index of other pages than the newest"):
        evaluate(config.EvaluateRun(storage=root, server=NOBODY))


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
    pages = refs.load_ref(root, "pages").rows
    (tmp_path / "mine").unlink()
    shutil.copytree(documents, tmp_path / "mine")
    next((tmp_path / "mine" / "pdfs").glob("*.pdf")).unlink()
    ingest(settings)
    assert refs.load_ref(root, "pages").rows < pages


def _searcher(request: dict[str, Any], call: int) -> Reply:
    """Searches for a word of the OCR file, and answers."""
    searched = any(message["role"] == "assistant" for message in request["messages"])
    return Reply("<answer>7 kg</answer>" if searched else "<search>gewicht</search>")


def test_texts_come_from_an_ocr_file_and_images_from_the_pdfs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, own = str(tmp_path / "store"), write_documents(tmp_path)
    ocr_file = _ocr_file(tmp_path / "ocr.jsonl", *(f"{topic}.pdf" for topic in TOPICS), "lost.pdf")
    found = config.Ingest(
        documents=str(own / "pdfs"),
        ocr_file=ocr_file,
        questions=str(own / "questions.jsonl"),
        train_ratio=1,
        dev_ratio=0,
    )
    ingest(config.IngestRun(storage=root, ingest=found))
    said = capsys.readouterr().err
    assert "no_pdf (kept)" in said
    (listed,) = (line.split()[3] for line in said.splitlines() if line.startswith("Each of them: "))
    assert "no_pdf" in pq.read_table(listed)["reason"].to_pylist()
    agent = config.Agent(protocol="tags", observation="image", top_k=len(TOPICS) + 1, max_iterations=2)
    with ModelServer(_searcher) as server:
        asked = config.Server(base_url=server.url, model="base")
        asking = {"storage": root, "agent": agent, "server": asked}
        collect(config.CollectRun(**asking, collect=config.Collect(split="train", limit=2)))
        measured = config.Evaluate(split="train", question_id=["q1"])
        variants = [config.Variant(name="question", model="question"), config.Variant(name="base", model="base")]
        evaluate(config.EvaluateRun(**asking, evaluate=measured, variants=variants))
    turns = [row["turns"][0] for row in artifact.read_rows(refs.load_ref(root, "trajectories"))]
    assert [(turn["images_shown"], turn["images_missing"]) for turn in turns] == [(len(TOPICS), 1)] * 2
    shown = " ".join(capsys.readouterr().err.split())
    assert "pages shown as images 20 90.9%" in shown
    assert "pages shown as images 10 90.9%" in shown.partition("Turns of base")[2]
    assert "pages shown by their text, having no image 2 9.1%" in shown
    assert "images that gave way to text later 0 0.0%" in shown


def test_pages_are_made_again_when_a_pdf_or_the_ocr_file_changes_and_not_for_files_beside(tmp_path: Path) -> None:
    root, own = str(tmp_path / "store"), write_documents(tmp_path)
    ocr_file = _ocr_file(tmp_path / "ocr.jsonl", "pump.pdf")
    (tmp_path / "exclude.json").write_text('["q1"]')

    def pages(where: Path) -> artifact.Artifact:
        found = config.Ingest(
            documents=str(where),
            ocr_file=ocr_file,
            questions=str(own / "questions.jsonl"),
            exclude_json=str(tmp_path / "exclude.json"),
        )
        nonlocal read
        read = not ingest(config.IngestRun(storage=root, ingest=found))[0].cached
        return refs.load_ref(root, "pages")

    read = False
    made = [pages(own / "pdfs")]
    assert artifact.read_provenance(made[0])["sources"] == {
        "documents": storage.fingerprint(str(own / "pdfs")),
        "ocr_file": storage.fingerprint(ocr_file),
    }
    of_questions = artifact.read_provenance(refs.load_ref(root, "questions"))["sources"]
    assert of_questions == {
        "questions": storage.fingerprint(str(own / "questions.jsonl")),
        "exclude_json": storage.fingerprint(str(tmp_path / "exclude.json")),
    }
    moved = (own / "pdfs").rename(tmp_path / "moved")
    assert (pages(moved), read) == (made[0], False)
    assert json.loads(storage.read_bytes(storage.join(root, "page-images/documents.json"))) == {"documents": str(moved)}
    (moved / "notes.txt").write_text("no PDF")
    assert (pages(moved).sha256 != made[0].sha256, read) == (True, True)  # read where they lie now
    made.append(pages(moved))
    (moved / "more notes.txt").write_text("no PDF either")
    assert (pages(moved).sha256 == made[1].sha256, read) == (True, True)
    _ocr_file(tmp_path / "ocr.jsonl", "pump.pdf", "valve.pdf")
    assert pages(moved).sha256 != made[1].sha256
    made.append(pages(moved))
    shutil.copy(moved / "pump.pdf", moved / "valve.pdf")
    assert pages(moved).sha256 != made[2].sha256


@pytest.mark.parametrize("observation", ["image", "both"])
@pytest.mark.parametrize(
    "ask",
    [
        lambda run: collect(config.CollectRun(**run)),
        lambda run: mine(config.MineRun(**run)),
        lambda run: evaluate(config.EvaluateRun(**run)),
        lambda run: infer(config.InferRun(**run, question=["How heavy?"])),
    ],
    ids=["collect", "mine", "evaluate", "infer"],
)
def test_images_of_pages_without_any_pdf_are_refused_at_once(
    tmp_path: Path, documents: Path, ask: Callable[[dict[str, Any]], Any], observation: Any
) -> None:
    root = str(tmp_path / "store")
    ocr_file = _ocr_file(tmp_path / "ocr.jsonl", *(f"{topic}.pdf" for topic in TOPICS))
    found = config.Ingest(ocr_file=ocr_file, questions=str(documents / "questions.jsonl"))
    ingest(config.IngestRun(storage=root, ingest=found))
    run = {"storage": root, "server": NOBODY, "agent": config.Agent(protocol="tags", observation=observation)}
    with pytest.raises(ConfigError, match=r"none of the pages has a PDF.*--documents.*--observation text"):
        ask(run)
    assert not refs.has_ref(root, "results-question")
