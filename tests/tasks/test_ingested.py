"""Pages, questions and index are taken together only if they belong together."""

from pathlib import Path

import pytest

from tasks import artifact, config, refs, storage
from tasks.artifact import Artifact
from tasks.errors import ArtifactError
from tasks.ingested import load_ingested
from tasks.search.index import build_index

NAMES = ("questions", "pages", "index")


def _ingest(root: str, text: str) -> dict[str, Artifact]:
    """Pages with this text, and what belongs to them; no reference points to them yet."""
    page = {"file": "a.pdf", "page_number": 1, "total_pages": 1, "title": "a", "text": text}
    question = {"question_id": "q", "question": "What?", "answers": [], "answer_locations": [], "split": "train"}

    def stored(row: dict[str, object], name: str, schema: str, **inputs: Artifact) -> Artifact:
        uri = storage.join(root, text, f"{name}.parquet")
        return artifact.write_table(artifact.table_of([row], schema), uri, schema, artifact.provenance(inputs))

    pages = stored(page, "pages", "pages/2")
    questions = stored(question, "questions", "questions/1", pages=pages)
    return {
        "questions": questions,
        "pages": pages,
        "index": build_index(pages, config.Index(), storage.join(root, text, "index")),
    }


@pytest.mark.parametrize("saved", [("pages",), ("pages", "questions"), ("pages", "index"), ("questions",), ("index",)])
def test_of_an_ingest_that_is_under_way_nothing_is_taken(tmp_path: Path, saved: tuple[str, ...]) -> None:
    root = str(tmp_path)
    with pytest.raises(ArtifactError, match="yet"):
        load_ingested(root, *NAMES)
    old, new = _ingest(root, "old"), _ingest(root, "new")
    for name in NAMES:
        refs.save_ref(root, name, old[name])
    assert load_ingested(root, *NAMES) == old
    for name in saved:
        refs.save_ref(root, name, new[name])
    with pytest.raises(ArtifactError, match="of other pages than the newest: an ingest is under way"):
        load_ingested(root, *NAMES)
    for name in NAMES:
        refs.save_ref(root, name, new[name])
    assert load_ingested(root, *NAMES) == new
