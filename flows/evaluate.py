"""evaluate: each run on the same unseen questions → results, comparison, report. compare: of runs measured before.

drag evaluate --split test
drag compare --compare question base adapter
"""

import itertools
from collections.abc import Iterator, Sequence

from prefect import flow
from rich.console import Console
from rich.markdown import Markdown
from tasks.agent.prompts import prompt_fingerprint

from flows.collect import collected
from flows.serving import Connect, model_server
from flows.summary import show_markdown, show_stages, work_dir
from tasks import artifact, config, storage
from tasks.artifact import Artifact, load_ref, read_provenance, read_rows
from tasks.cache import stage_key
from tasks.compare import comparison_markdown, headline, sentence
from tasks.errors import ConfigError
from tasks.metrics import metrics_markdown, read_runs
from tasks.stage_tasks import compare_runs, rescore_run, score_run, write_html_report
from tasks.stages import StageRun, run_stage


def evaluated(root: str, settings: config.EvaluateRun, connect: Connect) -> list[StageRun]:
    """Measure every variant: the raw question as query, the base model, the adapter; then rank first queries again."""
    runs = []
    for variant in settings.variants:
        if variant.model == "question":
            source = {"questions": load_ref(root, "questions")}
        else:
            run = _rollouts(root, settings, variant, connect)
            runs.append(run)
            source = {"trajectories": run.artifacts["trajectories"]}
            artifact.save_ref(root, f"trajectories-{variant.name}", source["trajectories"])
        runs.append(_scored(root, settings, variant, source))
        results = runs[-1].artifacts["results"]
        artifact.save_ref(root, f"results-{variant.name}", results)
        for search in settings.evaluate.rescore:
            runs.append(_rescored(root, settings, search, f"{variant.name} {search_name(search)}", results))
    return runs


def _rollouts(root: str, settings: config.EvaluateRun, variant: config.Variant, connect: Connect) -> StageRun:
    agent = settings.agent.model_copy(update={"examples": variant.examples})
    adapter = load_ref(root, "adapter") if variant.model == "adapter" else None
    if adapter and (taught := read_provenance(adapter)["prompt_fingerprint"]) != prompt_fingerprint(agent):
        raise ConfigError(
            f"the adapter was trained on prompt {taught}, run {variant.name!r} would serve it {prompt_fingerprint(agent)}: "
            "use the agent settings that `format` was given"
        )
    greedy = config.Collect(
        split=settings.evaluate.split,
        limit=settings.evaluate.limit,
        sampling_config=["greedy"],
        allow_failed_share=settings.evaluate.allow_failed_share,
    )
    values = {name: getattr(settings, name) for name in config.ModelRun.model_fields} | {"agent": agent}
    return collected(root, config.CollectRun(**values, collect=greedy), connect, adapter, title=variant.name)


def _scored(root: str, settings: config.EvaluateRun, variant: config.Variant, source: dict[str, Artifact]) -> StageRun:
    index = load_ref(root, "index")
    top_k = settings.agent.top_k
    key = stage_key(
        "tasks.evaluate",
        settings={"evaluate": measuring(settings.evaluate), "search": settings.search},
        inputs={"index": index, **source},
        facts={"run": variant.name, "top_k": top_k},
    )
    return run_stage(
        score_run,
        root=root,
        key=key,
        uri=storage.join(root, "results", key),
        settings=settings.evaluate,
        search=settings.search,
        run=variant.name,
        top_k=top_k,
        index=index,
        **source,
    )


def _rescored(root: str, settings: config.EvaluateRun, search: config.Search, name: str, results: Artifact) -> StageRun:
    index = load_ref(root, "index")
    key = stage_key(
        "tasks.evaluate",
        settings={"evaluate": measuring(settings.evaluate), "search": search},
        inputs={"index": index, "results": results},
        facts={"run": name},
    )
    uri = storage.join(root, "results", key)
    run = run_stage(
        rescore_run,
        root=root,
        key=key,
        uri=uri,
        settings=settings.evaluate,
        search=search,
        run=name,
        index=index,
        results=results,
    )
    artifact.save_ref(root, f"results-{name}", run.artifacts["results"])
    return run


def measuring(settings: config.Evaluate) -> config.Evaluate:
    """The settings that change a run's results: not the ones of the comparison that follows."""
    return settings.model_copy(update={"rescore": [], "resamples": 10_000, "allow_failed_share": 0.0})


def search_name(search: config.Search) -> str:
    """How a table tells search settings apart, such as "and" or "or + question"."""
    return search.operator + (" + question" if search.expand == "question" else "")


def all_runs(settings: config.EvaluateRun) -> Iterator[str]:
    """Names of the runs that `evaluated` leaves behind: every variant as it ran, then under each further search."""
    yield from (v.name for v in settings.variants)
    for search, variant in itertools.product(settings.evaluate.rescore, settings.variants):
        yield f"{variant.name} {search_name(search)}"


def compared(root: str, names: Sequence[str], resamples: int) -> list[StageRun]:
    """Compare runs, write the report, and show both.

    Raises:
        ConfigError: runs were measured on different questions.
    """
    results = {name: load_ref(root, f"results-{name}") for name in names}
    inputs = {f"{n:03d} {name}": a for n, (name, a) in enumerate(results.items())}
    key = stage_key("tasks.compare", inputs=inputs, facts={"resamples": resamples})
    compare_uri = storage.join(root, "comparisons", key)
    runs = [
        run_stage(
            compare_runs, root=root, key=key, uri=compare_uri, results=list(results.values()), resamples=resamples
        )
    ]
    comparison = runs[0].artifacts["comparison"]
    artifact.save_ref(root, "comparison", comparison)
    further = {
        name: load_ref(root, name)
        for name in ("processed", "loss_curve", "adapter", *(f"trajectories-{run}" for run in names))
        if artifact.has_ref(root, name)
    }
    key = stage_key("tasks.report", inputs={**inputs, "comparison": comparison, **further})
    report_uri = storage.join(root, "reports", key)
    runs.append(
        run_stage(
            write_html_report,
            root=root,
            key=key,
            uri=report_uri,
            results=list(results.values()),
            comparison=comparison,
            further=further,
        )
    )
    artifact.save_ref(root, "report", runs[-1].artifacts["report"])
    _show(list(results.values()), comparison, storage.join(runs[-1].artifacts["report"].uri, "index.html"))
    return runs


def _show(results: list[Artifact], comparison: Artifact, report: str) -> None:
    rows = read_rows(comparison)
    first = headline(rows)
    text = "\n\n".join(
        [metrics_markdown(read_runs(results).cells), comparison_markdown(rows), *([sentence(first)] if first else [])]
    )
    show_markdown("Comparison", f"{text}\n\nReport: {report}")
    console = Console(stderr=True)
    console.print(Markdown(text))
    console.print(f"Report: {report}", soft_wrap=True)


@flow(name="evaluate")
def evaluate(settings: config.EvaluateRun) -> list[StageRun]:
    """Measure runs on unseen questions, compare them, write the report."""
    root = storage.resolve(settings.storage)
    with model_server(settings.server, settings.serve, work_dir(root)) as connect:
        runs = evaluated(root, settings, connect)
    runs += compared(root, list(all_runs(settings)), settings.evaluate.resamples)
    show_stages(runs)
    return runs


@flow(name="compare")
def compare(settings: config.CompareRun) -> list[StageRun]:
    """Compare runs that were measured before, each with those named before it, and write the report."""
    runs = compared(storage.resolve(settings.storage), settings.compare, settings.resamples)
    show_stages(runs)
    return runs
