"""A sample collection, made on the spot: PDFs of fictional companies, and questions as their people would ask them.

The documents speak the language of their house ("ingress protection", "operating income", "apologies for absence"),
the questions mostly do not ("is it waterproof", "how much did they make", "who couldn't come"). That gap is what a
model learns to bridge; the expert queries show how far one gets who knows the terms.

    python -m tasks.sample FOLDER
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tasks.errors import ConfigError
from tasks.sample.family import read_family
from tasks.sample.render import to_pdf


@dataclass(frozen=True)
class Sample:
    """Where the collection was written."""

    documents: Path  # a folder of PDFs
    questions: Path  # JSON lines: {id, question, answers, answer_locations: [{document, page}], category}
    expert_queries: Path  # JSON lines: {id, query}


def sample_in(folder: Path) -> Sample:
    """Where the collection lies under `folder`."""
    return Sample(folder / "pdfs", folder / "questions.jsonl", folder / "expert_queries.jsonl")


def write_sample(folder: Path) -> Sample:
    """Write the collection under `folder`: the same bytes each time, in a few seconds.

    Raises:
        ConfigError: files that no sample wrote are in its place.
    """
    sample = sample_in(folder)
    if not sample.expert_queries.exists() and (sample.questions.exists() or any(sample.documents.glob("*"))):
        raise ConfigError(f"{folder} holds documents or questions that are not the sample's: name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    sample.expert_queries.touch()  # killed from here on, what lies here is a sample's
    shutil.rmtree(sample.documents, ignore_errors=True)  # an older sample had others
    sample.documents.mkdir()
    questions: list[dict[str, object]] = []
    queries: list[dict[str, object]] = []
    for path in sorted(Path(__file__).parent.glob("*.yaml")):
        for document in read_family(path):
            (sample.documents / document.file).write_bytes(to_pdf(document))
            for number, question in enumerate(document.questions, start=1):
                name = f"{Path(document.file).stem}-{number:02}"
                questions.append(
                    {
                        "id": name,
                        "question": question.text,
                        "answers": [[question.answer]],
                        "answer_locations": [{"document": document.file, "page": page} for page in question.pages],
                        "category": document.category,
                    }
                )
                queries.append({"id": name, "query": question.expert_query})
    _write_lines(sample.questions, questions)
    _write_lines(sample.expert_queries, queries)
    return sample


def _write_lines(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
