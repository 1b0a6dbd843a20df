"""ingest: PDFs, OCR text or both, and questions → pages, questions with splits, search index.

drag ingest --documents FOLDER_OF_PDFS --questions questions.jsonl
drag ingest --documents FOLDER_OF_PDFS --ocr-file ocr_output.jsonl --questions questions.jsonl
drag ingest --ocr-file ocr_output.jsonl --questions questions.jsonl                            # without page images
"""

import os
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flows.form import settings_flow
from flows.summary import show_markdown, show_stages
from tasks import artifact, config, hub, refs, storage
from tasks.cache import content_fingerprint, stage_key
from tasks.config.documents import MOST_OCR_BELOW
from tasks.images import note_documents
from tasks.markdown import markdown_table
from tasks.search import ENGINES
from tasks.set_aside import count_reasons
from tasks.stage_tasks import index_pages, read_documents, read_questions, read_scans
from tasks.stages import StageRun, run_stage
from tasks.tesseract import installed

_READ = ("documents", "ocr_file", "questions", "include_json", "exclude_json")


def ingested(root: str, settings: config.Ingest, index: config.Index) -> list[StageRun]:
    """Run the stages, point the refs to what they made, and say what was set aside."""
    # a shell expands ~ only where it begins a word
    places = {name: getattr(settings, name) for name in _READ}
    settings = settings.model_copy(update={name: os.path.expanduser(place) for name, place in places.items() if place})
    if settings.questions and settings.questions.startswith(hub.PREFIX):
        settings = settings.model_copy(update={"questions": hub.pinned(settings.questions)})
    # where things lie does not count, what they hold does
    elsewhere: dict[str, Any] = dict.fromkeys(("workers", *_READ))
    elsewhere |= {"scans": config.Scans()}  # how a page was read shows in the pages
    parsing = settings.model_copy(update=elsewhere)
    # on which pages pictures are noted; a setting's bound, and settings are not part of the code that counts
    noted: dict[str, object] = {"pictures_below": MOST_OCR_BELOW, "reader": artifact.versions("pymupdf")}
    sources = _pages_of(settings)
    beside = _beside(settings.documents) if settings.documents else []
    key = stage_key("tasks.documents", facts={**noted, **sources, "beside": beside})
    uri = storage.join(root, "documents", key)
    documents = run_stage(read_documents, root=root, key=key, uri=uri, settings=settings, sources=sources)
    read = documents.artifacts["documents"]
    tesseract = installed()
    version = tesseract.version if tesseract else None  # which languages there are changes no page
    key = stage_key(
        "tasks.ocr", settings={"scans": settings.scans}, inputs={"documents": read}, facts={"tesseract": version}
    )
    scans = run_stage(
        read_scans,
        root=root,
        key=key,
        uri=storage.join(root, "scans", key),
        settings=settings,
        documents=read,
        cache=storage.join(root, "ocr"),
    )
    runs = [documents, scans]
    pages = scans.artifacts["pages"]
    if settings.questions:
        files = {name: getattr(settings, name) for name in ("questions", "include_json", "exclude_json")}
        sources = {name: content_fingerprint(file) for name, file in files.items() if file}
        key = stage_key("tasks.questions", settings={"ingest": parsing}, inputs={"pages": pages}, facts=sources)
        uri = storage.join(root, "questions", key)
        runs.append(
            run_stage(read_questions, root=root, key=key, uri=uri, settings=settings, pages=pages, sources=sources)
        )
    engines = artifact.versions("whoosh-reloaded", ENGINES[index.engine].package)  # the first analyzes words for all
    key = stage_key(
        "tasks.search.index", settings={"index": index}, inputs={"pages": pages}, facts={"engines": engines}
    )
    runs.append(
        run_stage(index_pages, root=root, key=key, uri=storage.join(root, "index", key), settings=index, pages=pages)
    )
    if settings.documents:
        note_documents(root, settings.documents)  # stages that were cached know only where the documents were
    if not settings.questions:  # those of other pages would be searched for in vain
        refs.drop_ref(root, "questions")
    for run in runs:
        for name, made in run.artifacts.items():
            refs.save_ref(root, name, made)
    show_set_aside(runs)
    return runs


def _pages_of(settings: config.Ingest) -> dict[str, str]:
    """Hashes of what pages are read of. Pages are named after them, so other files of the folder must not count."""
    sources = {}
    if settings.documents:
        sources["documents"] = storage.fingerprint(settings.documents, ".pdf")
    if settings.ocr_file:
        sources["ocr_file"] = storage.fingerprint(settings.ocr_file)
    return sources


def _beside(documents: str) -> list[str]:
    """Names of the folder's other files, which are set aside by their names alone."""
    files = storage.iter_files(documents, closed=[])
    return sorted(storage.relative(file, documents) for file in files if not file.lower().endswith(".pdf"))


def show_set_aside(runs: list[StageRun]) -> None:
    """What was left out, or only noted, and why: on the terminal and in the UI."""
    tables = [a for run in runs for name, a in run.artifacts.items() if name.startswith("set_aside") and a.rows]
    counts = count_reasons(*tables)
    if not counts:
        return
    columns = ("count", "reason", "what it means", "for instance")
    rows = [(str(c.times), c.reason + (" (kept)" if c.kept else ""), c.meaning, c.example) for c in counts]
    table = Table(*columns, title="Set aside, and why", title_justify="left")
    for row in rows:
        table.add_row(*map(escape, row))
    whole = f"Each of them: {' '.join(a.uri for a in tables)}"
    console = Console(stderr=True)
    console.print(table)
    console.print(whole, soft_wrap=True, markup=False, highlight=False)
    show_markdown("Set aside", f"{markdown_table(columns, rows)}\n\n{whole}")


@settings_flow(name="ingest")
def ingest(settings: config.IngestRun) -> list[StageRun]:
    """Read documents and questions, and index the pages."""
    runs = ingested(storage.resolve(settings.storage), settings.ingest, settings.index)
    show_stages(runs)
    return runs
