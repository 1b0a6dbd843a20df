"""improve: the whole loop, once round: ingest, collect or mine, prepare, finetune, evaluate, report.

    drag improve --config deployments/recipes/demo.yaml

A second run with nothing changed does no work and says so; a changed setting redoes what depends on it and no more.

As a command it runs one flow after the other in its own process. Started from its deployment, it starts theirs, so that each
runs in its own work pool, and waits; when one fails it does too. A retry, also of one that was killed, goes on from there: it
waits for a run that still runs, runs one again that failed, and takes one that completed as it is. Its stages go on from what
its own have made, whatever others make of the same storage meanwhile.
"""

import json
import time
from collections.abc import Iterator
from typing import Any, cast

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas import FlowRun
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, ArtifactFilterKey
from prefect.deployments import run_deployment
from prefect.logging import get_run_logger
from prefect.runtime import deployment, flow_run
from prefect.states import Scheduled

from flows.collect import collect
from flows.evaluate import evaluate
from flows.finetune import finetune
from flows.form import SettingsFlow, settings_flow
from flows.ingest import ingest
from flows.mine import mine
from flows.prepare import prepare
from flows.summary import STAGES_KEY, show_rows, show_stages
from tasks import config, refs, storage
from tasks.chosen import select
from tasks.config.adapters import NEWEST
from tasks.errors import StageError
from tasks.stages import StageRun

_ASK_EVERY_S = 2.0


def steps(settings: config.Improve) -> Iterator[tuple[SettingsFlow[Any, list[StageRun]], config.Run]]:
    """The flows that make up the loop, in their order, each with its settings."""
    run = {"storage": settings.storage}
    asking = settings.asking
    yield ingest, config.IngestRun(**run, ingest=settings.ingest, index=settings.index)
    agent = settings.collect_agent or settings.agent.model_copy(update={"examples": True})
    if settings.mine is None or settings.mine.states != "questions":
        yield collect, config.CollectRun(**asking | {"agent": agent}, collect=settings.collect)
    if settings.mine:
        yield mine, config.MineRun(**asking | {"agent": agent}, mine=settings.mine)
    preparing = {"process": settings.process, "format": settings.format, "agent": settings.agent}
    yield prepare, config.PrepareRun(**run, **preparing, source="mined" if settings.mine else "trajectories")
    of_server = settings.server
    model: dict[str, Any] = {"model": of_server.model, "trusted_remote_code": of_server.trusted_remote_code}
    from_adapter = ""
    for training in settings.trainings:
        chosen: dict[str, Any] = {"finetune": training, "launch": settings.launch, "from_adapter": from_adapter}
        if training.method == "sft":
            chosen["training_set"] = settings.learned_from(training)
        yield finetune, config.FinetuneRun(**run, **model, **chosen)
        from_adapter = NEWEST
    yield evaluate, config.EvaluateRun(**asking, evaluate=settings.evaluate, variants=settings.variants)


@settings_flow(name="improve")
def improve(settings: config.Improve) -> list[StageRun]:
    """Collect the model's own searches, learn from what worked, and measure whether it helped."""
    root, loop = storage.resolve(settings.storage), str(flow_run.id)
    rows: list[dict[str, Any]] = []
    runs: list[StageRun] = []
    try:
        for number, (step, chosen) in enumerate(steps(settings)):
            if deployment.id:
                rows += _in_its_pool(number, step.name, chosen)
            else:
                runs += step(chosen)
            if step is ingest:
                _refuse_empty_splits(root, loop, settings)
    except BaseException:
        if not deployment.id:  # nobody retries a command's run, and the same command is another
            refs.forget_refs_of(root, loop)
        raise
    refs.forget_refs_of(root, loop)
    if deployment.id:
        show_rows(rows)
    else:
        show_stages(runs)
    return runs


def _refuse_empty_splits(root: str, loop: str, settings: config.Improve) -> None:
    """What would else be found out only after collection and training.

    Raises:
        InputError: a split that the loop learns from, or measures on, holds no question.
    """
    with refs.refs_of(loop):
        questions = refs.load_ref(root, "questions")
    for _, chosen in steps(settings):
        for section in ("collect", "mine", "evaluate"):
            if asks := getattr(chosen, section, None):
                select(questions, asks.split, None)


def _in_its_pool(number: int, name: str, settings: config.Run) -> list[dict[str, Any]]:
    """Run the deployment of that name to its end, as the step of that number; returns what its stages did.

    Raises:
        StageError: it did not complete.
    """
    with get_client(sync_client=True) as client:
        child = _child(client, number, name, settings)
        while not (child.state and child.state.is_final()):
            time.sleep(_ASK_EVERY_S)
            child = client.read_flow_run(child.id)
        if not child.state.is_completed():
            raise StageError(
                f"{name} did not complete; its run {child.name} ended as {child.state.name}: {child.state.message}. Retry this "
                "run when it is mended: what is done stays done"
            )
        made = client.read_artifacts(
            artifact_filter=ArtifactFilter(
                flow_run_id=ArtifactFilterFlowRunId(any_=[child.id]), key=ArtifactFilterKey(any_=[STAGES_KEY])
            )
        )
    return json.loads(str(made[0].data))


def _child(client: SyncPrefectClient, number: int, name: str, settings: config.Run) -> FlowRun:
    """The one run of a deployment that is this step of this run, whichever try of this run it was that started it."""
    key, parameters = f"{flow_run.id}-{number}-{name}", settings.model_dump(mode="json")
    child = cast(FlowRun, run_deployment(f"{name}/{name}", parameters=parameters, timeout=0, idempotency_key=key))
    get_run_logger().info("%s is the run %s", name, child.name)
    if child.state and child.state.is_final() and not child.state.is_completed():
        client.set_flow_run_state(child.id, Scheduled(message=f"Tried again by {flow_run.name}"), force=True)
        child = client.read_flow_run(child.id)
    return child
