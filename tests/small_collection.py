"""Ten small manuals with a question each, and a scripted model that searches them: what flow tests run on."""

from pathlib import Path
from typing import Any

import pymupdf

from flows.ingest import ingest
from tasks import config
from tasks.stages import StageRun
from tests.model_server import Reply

TOPICS = ["pump", "valve", "motor", "filter", "boiler", "sensor", "gasket", "rotor", "piston", "turbine"]


def write_documents(folder: Path) -> Path:
    """Ten manuals of two pages; the second page of each says how heavy its part is."""
    (folder / "pdfs").mkdir()
    lines = []
    for number, topic in enumerate(TOPICS):
        pdf = pymupdf.open()
        for text in (f"Safety of the {topic}. Read before use.", f"Data. The mass of the {topic} is {number + 3} kg."):
            pdf.new_page().insert_text((72, 72), text)
        pdf.save(folder / "pdfs" / f"{topic}.pdf")
        lines.append(
            f'{{"id": "q{number}", "question": "How heavy is the {topic}?", "answers": [["{number + 3} kg"]], '
            f'"answer_locations": [{{"document": "{topic}.pdf", "page": 2}}], "category": "mass"}}'
        )
    (folder / "questions.jsonl").write_text("\n".join(lines))
    return folder


def searcher(request: dict[str, Any], call: int) -> Reply:
    """Searches for too little first, then for the right words, then answers."""
    del call
    messages = request["messages"]
    asked = max(n for n, m in enumerate(messages) if "Question:" in m["content"])  # worked examples come before it
    topic = next((t for t in TOPICS if t in messages[asked]["content"]), "lamp")
    tries = sum(m["role"] == "assistant" for m in messages[asked:])
    said = [f"<search>read {topic}</search>", f"<search>mass {topic}</search>", "<answer>7 kg</answer>"]
    return Reply(f"<think>So.</think>\n{said[min(tries, 2)]}")


def ingest_small(root: str, documents: Path) -> list[StageRun]:
    found = config.Ingest(
        documents=str(documents / "pdfs"), questions=str(documents / "questions.jsonl"), train_ratio=0.5, dev_ratio=0.0
    )
    return ingest(config.IngestRun(storage=root, ingest=found))
