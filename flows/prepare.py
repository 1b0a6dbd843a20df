"""prepare: trajectories → scored rollouts and preference pairs → training sets. Its halves are flows too.

drag process                                              # the newest trajectories
drag process --since 2026-11-01 --until 2026-11-30        # those of all nights of November
drag process --source mined                               # the newest mined queries
drag format --formats sft_best dpo --jsonl
"""

from typing import Any

from flows.form import settings_flow
from flows.summary import show_markdown, show_picture, show_stages
from tasks import config, nights, plots, refs, statistics, storage
from tasks.agent.prompts import told_by
from tasks.cache import stage_key
from tasks.stage_tasks import format_training_sets, process_trajectories
from tasks.stages import StageRun, run_stage


def processed(root: str, settings: config.Process, chosen: config.Nights, source: config.Source) -> StageRun:
    """Score the rollouts and pair their queries; show the statistics.

    Raises:
        EmptyError: no night lies in the range, or no rollout is left.
        ArtifactError: nothing was collected, or only nights were and no range chooses among them.
    """
    trajectories = nights.collections(root, nights.gathered(source), chosen.since, chosen.until)
    key = stage_key("tasks.process", settings={"process": settings}, inputs=trajectories)
    uri = storage.join(root, "processed", key)
    run = run_stage(process_trajectories, root=root, key=key, uri=uri, settings=settings, trajectories=trajectories)
    for name, made in run.artifacts.items():
        refs.save_ref(root, name, made)
    found = statistics.read(run.artifacts["statistics"])
    show_markdown("Statistics of the rollouts", statistics.markdown(found))
    show_picture("What the rollouts found", plots.distributions(found))
    return run


def formatted(root: str, settings: config.Format, agent: config.Agent) -> StageRun:
    """Make the training sets for an agent that is to be served with these settings.

    Raises:
        ArtifactError: nothing was processed yet, or the newest rollouts and the newest pairs were not made together.
        EmptyError: no example is left.
    """
    inputs: dict[str, Any] = {**refs.load_together(root, ["processed", "pairs"])}
    key = stage_key("tasks.formats", settings={"format": settings}, inputs=inputs, facts={"agent": told_by(agent)})
    uri = storage.join(root, "training-sets", key)
    run = run_stage(format_training_sets, root=root, key=key, uri=uri, settings=settings, agent=agent, **inputs)
    for name, made in run.artifacts.items():
        refs.save_ref(root, name, made)
    return run


@settings_flow(name="process")
def process(settings: config.ProcessRun) -> list[StageRun]:
    """Score the newest trajectories or mined queries, or those of a range of nights, and pair the queries."""
    root = storage.resolve(settings.storage)
    runs = [processed(root, settings.process, settings.nights, settings.source)]
    show_stages(runs)
    return runs


@settings_flow(name="format")
def format_(settings: config.FormatRun) -> list[StageRun]:
    """Make training sets of the scored rollouts."""
    runs = [formatted(storage.resolve(settings.storage), settings.format, settings.agent)]
    show_stages(runs)
    return runs


@settings_flow(name="prepare")
def prepare(settings: config.PrepareRun) -> list[StageRun]:
    """Score the newest trajectories or mined queries, or those of a range of nights, and make training sets of them."""
    root = storage.resolve(settings.storage)
    runs = [processed(root, settings.process, settings.nights, settings.source)]
    runs.append(formatted(root, settings.format, settings.agent))
    show_stages(runs)
    return runs
