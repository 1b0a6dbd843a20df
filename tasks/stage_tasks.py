"""The stages as Prefect tasks: each a thin wrapper of a plain function, taking and returning references.

Every one takes `key` (it is cached by that), `uri` (the folder to write to), settings and artifacts. What a stage needs is
imported when it runs, so that the command line starts fast and ingest needs no training packages.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from prefect.logging import get_run_logger

from tasks import config, storage
from tasks.artifact import Artifact
from tasks.progress import progress
from tasks.secrets import without_secrets
from tasks.stages import stage
from tasks.supervise import Connect


@stage("read documents")
def read_documents(key: str, uri: str, settings: config.Ingest, sources: Mapping[str, str]) -> dict[str, Artifact]:
    """PDFs, OCR text or both → pages, and what was set aside."""
    from tasks import documents

    with progress("Reading documents") as on_progress:
        pages, aside = documents.read_documents(
            settings,
            storage.join(uri, "pages.parquet"),
            storage.join(uri, "set_aside.parquet"),
            on_progress,
            sources=sources,
        )
    return {"documents": pages, "set_aside_documents": aside}


@stage("read scans")
def read_scans(key: str, uri: str, settings: config.Ingest, documents: Artifact, cache: str) -> dict[str, Artifact]:
    """Pages → the same, those without a text layer read by OCR; and those that this brought nothing for."""
    from tasks import ocr

    with progress("Reading scans") as on_progress:
        pages, aside = ocr.read_scans(
            documents,
            settings.scans,
            settings.documents,
            cache,
            storage.join(uri, "pages.parquet"),
            storage.join(uri, "set_aside.parquet"),
            workers=settings.workers,
            on_progress=on_progress,
        )
    return {"pages": pages, "set_aside_scans": aside}


@stage("read questions")
def read_questions(
    key: str, uri: str, settings: config.Ingest, pages: Artifact, sources: Mapping[str, str]
) -> dict[str, Artifact]:
    """Questions with known pages, checked against the pages, with splits."""
    from tasks import questions

    found, aside = questions.read_questions(
        settings,
        pages,
        storage.join(uri, "questions.parquet"),
        storage.join(uri, "set_aside.parquet"),
        sources=sources,
    )
    return {"questions": found, "set_aside_questions": aside}


@stage("index pages")
def index_pages(key: str, uri: str, settings: config.Index, pages: Artifact) -> dict[str, Artifact]:
    """Pages → search index."""
    from tasks.search.index import build_index

    return {"index": build_index(pages, settings, storage.join(uri, "index"))}


@stage("collect", run_name="collect: {title}", retries=0)
def collect_trajectories(
    key: str,
    uri: str,
    settings: config.CollectRun,
    connect: Connect,
    adapter: Artifact | None,
    title: str,
    **run: Any,
) -> dict[str, Artifact]:
    """Questions → trajectories of the base model, or of an adapter. Its shards are task runs that retry by themselves."""
    return _gathered("trajectories", f"Collecting: {title}", uri, settings, connect, adapter, **run)


@stage("find states")
def find_states(
    key: str,
    uri: str,
    settings: config.Mine,
    agent: config.Agent,
    questions: Artifact,
    trajectories: Mapping[str, Artifact],
) -> dict[str, Artifact]:
    """Trajectories → the conversations before their turns, where queries are mined."""
    from tasks import states

    return {"states": states.find(questions, trajectories, settings, agent, uri)}


@stage("mine", run_name="mine: {title}", retries=0)
def mine_queries(
    key: str,
    uri: str,
    settings: config.CollectRun,
    connect: Connect,
    adapter: Artifact | None,
    title: str,
    **run: Any,
) -> dict[str, Artifact]:
    """Questions, and conversations to go on from → one turn of the model for each sample, as `collect` runs them."""
    return _gathered("mined", f"Mining: {title}", uri, settings, connect, adapter, **run)


def _gathered(
    name: str,
    label: str,
    uri: str,
    settings: config.CollectRun,
    connect: Connect,
    adapter: Artifact | None,
    **run: Any,
) -> dict[str, Artifact]:
    from tasks import collect_run

    made = collect_run.collect_all(
        settings, connect=connect, adapter=adapter, uri=uri, label=f"{label}, rollouts", **run
    )
    return {name: made}


@stage("score night")
def score_night(key: str, uri: str, gathered: Artifact, run: str) -> dict[str, Artifact]:
    """What a night gathered → how each question fared, for later nights."""
    from tasks import nights

    return {"scores": nights.write_scores(gathered, run, storage.join(uri, "scores.parquet"))}


@stage("reparse")
def reparse_trajectories(key: str, uri: str, trajectories: Artifact, index: Artifact) -> dict[str, Artifact]:
    """Trajectories → the same, read by today's parser, and what has changed."""
    from tasks import reparse

    again, changes = reparse.reparse(trajectories, index, uri)
    return {"trajectories": again, "changes": changes}


@stage("process")
def process_trajectories(
    key: str, uri: str, settings: config.Process, trajectories: Mapping[str, Artifact]
) -> dict[str, Artifact]:
    """Trajectories of one collection or of several → scored rollouts, preference pairs, statistics."""
    from tasks import process

    processed, pairs, statistics = process.process(trajectories, settings, uri)
    return {"processed": processed, "pairs": pairs, "statistics": statistics}


@stage("format")
def format_training_sets(
    key: str, uri: str, settings: config.Format, agent: config.Agent, processed: Artifact, pairs: Artifact
) -> dict[str, Artifact]:
    """Scored rollouts and pairs → training sets, whose prompts are those that `agent` is served with."""
    from tasks import formats

    return formats.format_training(processed, pairs, settings, agent, uri)


@stage("finetune", retries=1)
def finetune_adapter(
    key: str,
    uri: str,
    settings: config.Finetune,
    processes: config.Launch,
    model: str,
    trusted: Sequence[str],
    training_set: Artifact,
    work_dir: Path,
    start: Artifact | None,
    images_root: str = "",
) -> dict[str, Artifact]:
    """Training set → LoRA adapter (or, by method reward, reward model) and its loss curve."""
    from tasks import limits
    from tasks.training import launch

    logger = get_run_logger()
    with limits.slot("gpu-training", together=processes.nodes), progress("Training") as on_progress:
        adapter, curve = launch.finetune(
            training_set,
            model,
            settings,
            uri,
            work_dir,
            lambda step, total, loss: on_progress(step, total),
            processes=processes,
            trusted=trusted,
            on_line=lambda line: logger.info("%s", without_secrets(line)),
            start=start,
            images_root=images_root,
        )
    if settings.method == "reward":
        return {"reward_model": adapter, "reward_loss_curve": curve}
    return {"adapter": adapter, "loss_curve": curve}


@stage("import", run_name="import: {settings.what}")
def import_artifacts(
    key: str, uri: str, settings: config.ImportRun, pages: Artifact | None, questions: Artifact | None
) -> dict[str, Artifact]:
    """Files of others → what the next stages take, and what was set aside."""
    if settings.what == "adapter":
        from tasks.exchange import adapter

        trusted = settings.trusted_remote_code
        made = adapter.import_adapter(settings.source[0], settings.model, trusted, storage.join(uri, "adapter"))
        return {"adapter": made}
    from tasks.exchange import importing

    showing = progress("Page images") if settings.agent.sees_images else nullcontext(lambda done, total: None)
    with showing as on_progress:
        return importing.import_rows(
            settings.what, settings.source, settings.agent, pages, questions, uri, settings.storage, on_progress
        )


@stage("merge")
def merge_adapter(key: str, uri: str, model: str, trusted: Sequence[str], adapter: Artifact) -> dict[str, Artifact]:
    """Adapter, or reward model, and its base → one model."""
    from tasks.training import merge

    name = "merged_reward_model" if adapter.schema == "reward-model/1" else "merged_model"
    return {name: merge.merge(adapter, model, storage.join(uri, "model"), trusted)}


@stage("score", run_name="score: {run}")
def score_run(
    key: str,
    uri: str,
    settings: config.Evaluate,
    search: config.Search,
    run: str,
    top_k: int,
    index: Artifact,
    trajectories: Artifact | None = None,
    questions: Artifact | None = None,
) -> dict[str, Artifact]:
    """Trajectories (or, for the raw question, the questions) → one result a question."""
    from tasks import evaluate
    from tasks.search.index import open_index

    searcher = open_index(index, search)
    out = storage.join(uri, "results.parquet")
    if trajectories:
        return {"results": evaluate.score(trajectories, searcher, settings, run, out)}
    assert questions is not None
    return {"results": evaluate.score_question_baseline(questions, searcher, settings, run, out, top_k=top_k)}


@stage("rescore", run_name="rescore: {run}")
def rescore_run(
    key: str, uri: str, settings: config.Evaluate, search: config.Search, run: str, index: Artifact, results: Artifact
) -> dict[str, Artifact]:
    """A run's first queries, ranked again under other search settings."""
    from tasks import evaluate
    from tasks.search.index import open_index

    out = storage.join(uri, "results.parquet")
    return {"results": evaluate.rescore(results, open_index(index, search), settings, run, out)}


@stage("compare")
def compare_runs(key: str, uri: str, results: list[Artifact], resamples: int) -> dict[str, Artifact]:
    """Results of several runs → each compared with those before it."""
    from tasks import compare

    return {"comparison": compare.compare(results, resamples, storage.join(uri, "comparison.parquet"))}


@stage("report")
def write_html_report(
    key: str,
    uri: str,
    results: Mapping[str, Sequence[Artifact]],
    comparisons: Mapping[str, Artifact],
    rollouts: Mapping[str, Artifact],
    statistics: Artifact | None = None,
    loss_curve: Artifact | None = None,
    adapter: Artifact | None = None,
) -> dict[str, Artifact]:
    """Results and their comparisons, as they ran ("") and under further searches by title → one HTML file."""
    from tasks import report
    from tasks import statistics as statistics_
    from tasks.artifact import read_provenance, read_rows
    from tasks.report.facts import facts

    made = {name: read_provenance(a) for name, a in rollouts.items()}
    written = report.write_report(
        results[""],
        comparisons[""],
        uri=storage.join(uri, "report"),
        facts=facts(made, read_provenance(adapter) if adapter else None),
        trajectories=rollouts,
        statistics=statistics_.read(statistics) if statistics else None,
        loss_curve=read_rows(loss_curve) if loss_curve else (),
        rescored={title: (results[title], comparisons[title]) for title in results if title},
    )
    return {"report": written}
