"""collect: questions × sampling configurations × samples → trajectories, in shards that are one task run each.

    drag collect --sampling-config default diverse --samples 4 --limit 500 --concurrency 32

Killed, or with failed rollouts: the same command again redoes only what is not finished. A night's collection, which asks again
what other nights asked, and takes new and hardest questions first:

    drag collect --dt 2026-11-24 --order new-and-hardest --limit 500
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from prefect import Task
from prefect.runtime import flow_run

from flows.form import settings_flow
from flows.serving import model_server, refuse_other_prompt
from flows.summary import show_stages, show_turns
from tasks import adapter_names, artifact, config, nights, refs, storage
from tasks import collect as shards
from tasks.artifact import Artifact
from tasks.cache import stage_key
from tasks.ingested import load_ingested, refuse_without_images
from tasks.model import fetch_model, model_fingerprint
from tasks.stage_tasks import collect_trajectories, score_night
from tasks.stages import StageRun, run_stage
from tasks.supervise import Connect

C = TypeVar("C", bound=config.Collect)
GatheringStage = Task[..., dict[str, Artifact]]

# How fast a run goes changes no rollout. How it is cut into shards changes none either, but parts lie in shards' folders.
_PACE = {"concurrency", "request_timeout", "rollout_timeout", "max_retries", "send_images"}
_RESUMING = {"resume", "flush_every", "allow_failed_share", "notify_failed_share"}
# a server of the user's own that moved changes no rollout; what it serves is known by its name alone
_WHERE = {"base_url", "trusted_remote_code"}
# it says which day `dt` is, and `dt` counts
_MEANING = {"time_zone"}
# these choose rollouts without changing any: with more of them a run goes on from where one with fewer ended
_CHOICE = {"limit", "samples", "sampling_config", "only"}
# of the vLLM that is started here; how much of the machine it takes changes no rollout
_SERVED = {"max_model_len", "tool_call_parser", "reasoning_parser", "adapters", "images_per_prompt"}


def collected(
    root: str,
    settings: config.CollectRun,
    connect: Connect,
    adapter: Artifact | None,
    title: str,
    *,
    check_first: bool = True,
    only: Sequence[str] = (),
    stage: GatheringStage = collect_trajectories,
    began: Artifact | None = None,
) -> StageRun:
    """Run every rollout that is not finished, and fold them into one trajectories artifact, a partition if it is a night's.

    Args:
        settings: its `dt` is None or a date.
        adapter: the adapter to ask, or None for the base model.
        title: what the progress bar says is collected.
        check_first: try a few questions before, and stop when none yields a search. A measurement takes what comes.
        only: ids of the questions to ask, where not all that the settings choose are.
        stage: what the stage is called, and what it makes.
        began: the states (tasks/states.py) that rollouts go on from. They choose rollouts without changing any.

    Raises:
        ArtifactError: nothing was ingested yet, or an ingest is under way.
        ConfigError: the adapter was trained on another prompt than these settings make.
        CollectError: more rollouts failed than `allow_failed_share`; the others are kept.
        SelfTestError: the model yields no parsable search under these settings.
    """
    inputs: dict[str, Any] = load_ingested(root, "questions", "pages", "index")
    if adapter:
        refuse_other_prompt(adapter, settings.agent)
        inputs["adapter"] = adapter
    remote = bool(settings.server.base_url)
    fingerprint = settings.server.model if remote else _weights(settings.server)
    # weights that we serve are known by their bytes, wherever they lie
    where = _WHERE if remote else _WHERE | {"model"}

    def key(without: set[str], **chosen_by: Artifact) -> str:
        chosen: dict[str, Any] = {
            "collect": settings.collect.model_dump(mode="json", exclude=_RESUMING | _MEANING | without),
            "server": settings.server.model_dump(mode="json", exclude=_PACE | where),
        }
        if "only" not in without:
            chosen["only"] = sorted(only)
        if not remote:
            chosen["serve"] = settings.serve.model_dump(mode="json", include=_SERVED)
        fixed = {"agent": settings.agent, "search": settings.search, "sampling": settings.sampling}
        return stage_key(
            "tasks.collect", settings=fixed, inputs=inputs | chosen_by, facts={**chosen, "model": fingerprint}
        )

    night = settings.collect.dt
    whole = key(set(), **({"states": began} if began else {}))
    uri = nights.partition_uri(root, night, whole) if night else storage.join(root, "trajectories", whole)
    run_key = key(_CHOICE)
    run_uri = storage.join(root, "rollouts", run_key)
    anew = None if settings.collect.resume else f"{run_uri}-anew/{flow_run.id}"
    run = run_stage(
        stage,
        root=root,
        key=whole,
        uri=uri,
        refresh=(anew is not None and not shards.is_done(anew)) or _has_failed(uri),
        run_uri=run_uri,
        run_key=run_key,
        settings=settings,
        connect=connect,
        adapter=adapter,
        title=title,
        model=fingerprint,
        check_first=check_first,
        only=only,
        began=began,
        anew=anew,
        **{name: inputs[name] for name in ("questions", "pages", "index")},
    )
    if night:
        nights.publish(root, uri, run.artifacts | _scores(root, uri, run.artifacts, run_key))
    return run


def _scores(root: str, uri: str, made: Mapping[str, Artifact], run_key: str) -> dict[str, Artifact]:
    """How the questions of a night fared: a stage of its own, so that a change of how they are scored asks nothing again."""
    (gathered,) = made.values()
    key = stage_key("tasks.nights", inputs={"gathered": gathered}, facts={"run": run_key})
    scored = run_stage(
        score_night, root=root, key=key, uri=storage.join(uri, "scores", key), gathered=gathered, run=run_key
    )
    return scored.artifacts


def _has_failed(uri: str) -> bool:
    """Whether an earlier run ended, as it was allowed to, with rollouts that failed: these are tried again."""
    stored = artifact.read_parts(storage.join(uri, "trajectories.parquet"), shards.SCHEMA, ["status"])
    return "failed" in stored["status"].to_pylist()


def dated(settings: C) -> C:
    """The settings with a date for "scheduled". When a run was scheduled for stays the same when it is retried."""
    if settings.dt != "scheduled":
        return settings
    night = nights.night_of(flow_run.scheduled_start_time, settings.time_zone)
    return settings.model_copy(update={"dt": night.isoformat()})


def _weights(server: config.Server) -> str:
    return model_fingerprint(fetch_model(server.model, server.trusted_remote_code))


@settings_flow(
    name="collect", about=lambda settings: settings.collect.split, zone=lambda settings: settings.collect.time_zone
)
def collect(settings: config.CollectRun) -> list[StageRun]:
    """Collect search trajectories of the base model, or of an adapter."""
    root = storage.resolve(settings.storage)
    refuse_without_images(root, settings.agent)
    adapter = adapter_names.chosen(root, settings.adapter)
    settings = settings.model_copy(update={"collect": dated(settings.collect)})
    title = f"{settings.collect.split} questions" + (f" of {settings.collect.dt}" if settings.collect.dt else "")
    with model_server(settings.server, settings.serve, root) as connect:
        runs = [collected(root, settings, connect, adapter, title)]
    if settings.collect.dt is None:  # nights are found by their dates, and must not come between an improve's stages
        refs.save_ref(root, "trajectories", runs[0].artifacts["trajectories"])
    show_turns("Turns of the rollouts", runs[0].artifacts["trajectories"])
    show_stages(runs)
    return runs
