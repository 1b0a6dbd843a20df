"""evaluate: each run on the same unseen questions → results, comparison, report. compare: of runs measured before.

drag evaluate --split test
drag evaluate --question-id q17 q42 --verbose    # these alone, turn by turn; comparison and report stay as they are
drag compare --compare question base adapter
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect.artifacts import create_link_artifact
from rich.console import Console
from rich.markdown import Markdown

from flows.collect import collected
from flows.form import settings_flow
from flows.serving import model_server
from flows.summary import show_markdown, show_stages, show_turns
from flows.verbose import show_ends, show_questions
from tasks import adapter_names, breakdown, config, refs, storage
from tasks.artifact import Artifact, read_provenance, read_rows
from tasks.cache import stage_key
from tasks.chosen import select
from tasks.compare import comparison_markdown
from tasks.ingested import load_ingested, refuse_without_images
from tasks.pages import PageStore
from tasks.progress import slug
from tasks.refs import load_ref
from tasks.runs import metric_cells, metrics_markdown, read_runs, repeated, repeated_markdown
from tasks.stage_tasks import compare_runs, rescore_run, score_run, write_html_report
from tasks.stages import StageRun, run_stage
from tasks.supervise import Connect

_LABEL_WIDTH, _RUN_WIDTH = 40, 26  # characters of a table's first column, and of each run's


@dataclass(frozen=True)
class Measured:
    """A variant's rollouts and their results; the raw question has no rollouts."""

    name: str
    trajectories: Artifact | None
    results: Artifact
    stages: list[StageRun]


def measured(root: str, settings: config.EvaluateRun, connect: Connect) -> Iterator[Measured]:
    """Measure every variant: the raw question as query, the base model, the adapter."""
    for variant in settings.variants:
        if variant.model == "question":
            scored = _scored(
                root, settings, variant, {"questions": load_ingested(root, "questions", "index")["questions"]}
            )
            yield Measured(variant.name, None, scored.artifacts["results"], [scored])
        else:
            run = _rollouts(root, settings, variant, connect)
            made = run.artifacts["trajectories"]
            scored = _scored(root, settings, variant, {"trajectories": made})
            yield Measured(variant.name, made, scored.artifacts["results"], [run, scored])


def _keep(root: str, settings: config.EvaluateRun, run: Measured) -> list[StageRun]:
    """Make a run the one that is compared under its name, also with its first queries ranked again."""
    if run.trajectories:
        refs.save_ref(root, f"trajectories-{run.name}", run.trajectories)
    refs.save_ref(root, results_ref(run.name), run.results)
    again = []
    for search in settings.evaluate.rescore:
        again.append(_rescored(root, settings, search, run.name, run.results))
        refs.save_ref(root, results_ref(run.name, search), again[-1].artifacts["results"])
    return again


def results_ref(run: str, search: config.Search | None = None) -> str:
    """The ref of a run's results: as it ran, or with its first queries ranked again under other search settings.

    No run's name has an underscore, so "base" searched by AND is not the run "base-and".
    """
    return f"results-{run}" if search is None else f"results-{run}_{slug(search_name(search))}"


def search_name(search: config.Search) -> str:
    """How a table tells search settings apart, such as "AND" or "OR, question added"."""
    usual = config.Search()
    boosts = [f"{n} ×{getattr(search, n + '_boost'):g}" for n in ("file", "title")]
    told = [
        b for b, n in zip(boosts, ("file_boost", "title_boost"), strict=True) if getattr(search, n) != getattr(usual, n)
    ]
    return ", ".join([search.operator.upper(), *(["question added"] if search.expand == "question" else []), *told])


def _rollouts(root: str, settings: config.EvaluateRun, variant: config.Variant, connect: Connect) -> StageRun:
    agent = settings.agent.model_copy(update={"examples": variant.examples})
    adapter = _adapter(root, variant)
    greedy = config.Collect(
        split=settings.evaluate.split,
        limit=settings.evaluate.limit,
        sampling_config=["greedy"],
        allow_failed_share=settings.evaluate.allow_failed_share,
    )
    # a recipe's overrides are meant for collection, and a measurement is greedy
    sampling = config.Sampling(max_tokens=settings.sampling.max_tokens)
    values = settings.asking | {"agent": agent, "sampling": sampling}
    return collected(
        root,
        config.CollectRun(**values, collect=greedy),
        connect,
        adapter,
        title=variant.name,
        check_first=False,
        only=settings.evaluate.question_id,
    )


def _adapter(root: str, variant: config.Variant) -> Artifact | None:
    return adapter_names.named(root, variant.adapter) if variant.model == "adapter" else None


def _scored(root: str, settings: config.EvaluateRun, variant: config.Variant, source: dict[str, Any]) -> StageRun:
    index = load_ref(root, "index")
    top_k = settings.agent.top_k
    key = stage_key(
        "tasks.evaluate",
        settings={"evaluate": measuring(settings), "search": settings.search},
        inputs={"index": index, **source},
        facts={"run": variant.name, "top_k": top_k},
    )
    return run_stage(
        score_run,
        root=root,
        key=key,
        uri=storage.join(root, "results", key),
        settings=measuring(settings),
        search=settings.search,
        run=variant.name,
        top_k=top_k,
        index=index,
        **source,
    )


def _rescored(root: str, settings: config.EvaluateRun, search: config.Search, run: str, results: Artifact) -> StageRun:
    index = load_ref(root, "index")
    key = stage_key(
        "tasks.evaluate",
        settings={"evaluate": measuring(settings), "search": search},
        inputs={"index": index, "results": results},
        facts={"run": run},
    )
    return run_stage(
        rescore_run,
        root=root,
        key=key,
        uri=storage.join(root, "results", key),
        settings=measuring(settings),
        search=search,
        run=run,
        index=index,
        results=results,
    )


def measuring(settings: config.EvaluateRun) -> config.Evaluate:
    """The settings that change a run's results: not the ones of the comparison that follows.

    Ranks are looked for at least as deep as the agent saw, or what it found would count as missed.
    """
    depth = max(settings.evaluate.depth, settings.agent.top_k)
    chosen = {name: getattr(settings.evaluate, name) for name in ("split", "limit", "question_id")}
    return config.Evaluate(**chosen, depth=depth)


def compared(root: str, names: Sequence[str], rescore: Sequence[config.Search], resamples: int) -> list[StageRun]:
    """Compare runs, each with those named before it, as they ran and under further searches; write the report.

    Raises:
        ArtifactError: a run was not measured.
        InputError: runs were measured on different questions, or under other conditions (`tasks.runs.conditions`).
    """
    sets = {"": [load_ref(root, results_ref(name)) for name in names]}
    for search in rescore:
        sets[search_name(search)] = [load_ref(root, results_ref(name, search)) for name in names]
    runs = [_comparison(root, results, resamples) for results in sets.values()]
    comparisons = {title: run.artifacts["comparison"] for title, run in zip(sets, runs, strict=True)}
    refs.save_ref(root, "comparison", comparisons[""])
    rollouts = {n: load_ref(root, f"trajectories-{n}") for n in names if refs.has_ref(root, f"trajectories-{n}")}
    further: dict[str, Any] = _learned(root, rollouts)
    key = stage_key(
        "tasks.report", inputs={**comparisons, **further, **{f"rollouts {n}": a for n, a in rollouts.items()}}
    )
    runs.append(
        run_stage(
            write_html_report,
            root=root,
            key=key,
            uri=storage.join(root, "reports", key),
            results=sets,
            comparisons=comparisons,
            rollouts=rollouts,
            **further,
        )
    )
    report = runs[-1].artifacts["report"]
    refs.save_ref(root, "report", report)
    _show(sets, comparisons, report)
    return runs


def _learned(root: str, rollouts: Mapping[str, Artifact]) -> dict[str, Artifact]:
    """The newest adapter, its loss curve, and the statistics of what it learned from: those that the measured runs are of."""
    measured = {read_provenance(made)["inputs"].get("adapter") for made in rollouts.values()}
    # an adapter that was imported came without the rest
    found = {name: load_ref(root, name) for name in ("adapter", "loss_curve") if refs.has_ref(root, name)}
    if "adapter" not in found or found["adapter"].sha256 not in measured:
        return {}
    source = read_provenance(found["adapter"])["learned_from"].get("processed")
    processed = all(refs.has_ref(root, name) for name in ("processed", "statistics"))
    # unless a newer collection has been processed since
    if processed and load_ref(root, "processed").sha256 == source:
        found["statistics"] = load_ref(root, "statistics")
    return found


def _comparison(root: str, results: list[Artifact], resamples: int) -> StageRun:
    inputs = {f"{n:03d}": a for n, a in enumerate(results)}
    key = stage_key("tasks.compare", inputs=inputs, facts={"resamples": resamples})
    uri = storage.join(root, "comparisons", key)
    return run_stage(compare_runs, root=root, key=key, uri=uri, results=results, resamples=resamples)


def _show(sets: Mapping[str, list[Artifact]], comparisons: Mapping[str, Artifact], report: Artifact) -> None:
    """The tables, on the terminal and in the UI; there also what the report concludes and where it lies."""
    parts = []
    for title, results in sets.items():
        rows = read_rows(comparisons[title])
        cells = metric_cells(read_runs(results), read_provenance(comparisons[title])["resamples"])
        same = repeated(cells)
        parts += [
            f"## {title or 'As it ran'}",
            metrics_markdown([cell for cell in cells if cell.metric not in same]),
            repeated_markdown(same),
            comparison_markdown([row for row in rows if row["metric"] not in same]),
        ]
        if not title:
            tables = map(read_rows, results)
            parts.append(breakdown.markdown({table[0]["run"]: table for table in tables}))
    text = "\n\n".join(filter(None, parts))
    page = storage.join(report.uri, "index.html")
    show_markdown("Comparison", "\n\n".join([text, *read_provenance(report)["conclusion"], f"Report: {page}"]))
    create_link_artifact(page if storage.is_s3(page) else Path(page).as_uri(), key="report", link_text="Report")
    console = Console(stderr=True)
    if not console.is_terminal:  # a log file has room for a column a run
        console.width = max(console.width, _LABEL_WIDTH + _RUN_WIDTH * len(sets[""]))
    console.print(Markdown(text))


@settings_flow(name="evaluate", about=lambda settings: settings.evaluate.split)
def evaluate(settings: config.EvaluateRun) -> list[StageRun]:
    """Measure runs on unseen questions, compare them, write the report; of single questions, show what came of each."""
    root = storage.resolve(settings.storage)
    chosen, single = settings.evaluate, bool(settings.evaluate.question_id)
    questions = load_ingested(root, "questions", "index")["questions"]
    select(questions, chosen.split, chosen.limit, chosen.question_id)  # before a server is started
    if any(variant.model != "question" for variant in settings.variants):
        refuse_without_images(root, settings.agent)
    for variant in settings.variants:
        _adapter(root, variant)
    runs: list[StageRun] = []
    ends = {}
    with model_server(settings.server, settings.serve, root) as connect:
        for run in measured(root, settings, connect):
            runs += run.stages if single else [*run.stages, *_keep(root, settings, run)]
            if run.trajectories and settings.agent.sees_images:
                show_turns(f"Turns of {run.name}", run.trajectories)
            if settings.verbose or single:
                ends[run.name] = read_rows(run.results)
            if settings.verbose:
                rollouts = read_rows(run.trajectories) if run.trajectories else ()
                show_questions(run.name, ends[run.name], rollouts, PageStore(load_ref(root, "pages")).text)
    if single:
        show_ends(ends)
    else:
        runs += compared(root, [v.name for v in settings.variants], chosen.rescore, chosen.resamples)
    show_stages(runs)
    return runs


@settings_flow(name="compare")
def compare(settings: config.CompareRun) -> list[StageRun]:
    """Compare runs that were measured before, each with those named before it, and write the report."""
    runs = compared(storage.resolve(settings.storage), settings.compare, [], settings.resamples)
    show_stages(runs)
    return runs
