"""improve: the whole loop, once round: ingest, collect, prepare, finetune, evaluate, report.

    drag improve --config deployments/recipes/demo.yaml

A second run with nothing changed does no work and says so; a changed setting redoes what depends on it and no more.
"""

from prefect import flow

from flows.collect import collected
from flows.evaluate import compared, evaluated
from flows.finetune import finetuned
from flows.ingest import ingested
from flows.prepare import formatted, processed
from flows.serving import model_server
from flows.summary import show_stages, work_dir
from tasks import artifact, config, storage
from tasks.stages import StageRun


@flow(name="improve")
def improve(settings: config.Improve) -> list[StageRun]:
    """Collect the model's own searches, learn from what worked, and measure whether it helped."""
    root = storage.resolve(settings.storage)
    asking = {name: getattr(settings, name) for name in config.ModelRun.model_fields}
    runs = ingested(root, settings.ingest, settings.index)

    # The server goes before training starts: both want the whole machine.
    with model_server(settings.server, settings.serve, work_dir(root)) as connect:
        agent = settings.collect_agent or settings.agent.model_copy(update={"examples": True})
        collecting = config.CollectRun(**asking | {"agent": agent}, collect=settings.collect)
        runs.append(collected(root, collecting, connect, adapter=None, title="training questions"))
        artifact.save_ref(root, "trajectories", runs[-1].artifacts["trajectories"])

    runs.append(processed(root, settings.process, runs[-1].artifacts["trajectories"]))
    runs.append(formatted(root, settings.format, settings.agent))
    chosen = next(name for name in settings.format.formats if name.startswith("sft_"))
    training_set = runs[-1].artifacts[chosen]
    runs.append(finetuned(root, settings.finetune, settings.server.model, training_set))

    measuring = config.EvaluateRun(**asking, evaluate=settings.evaluate, variants=settings.variants)
    with model_server(settings.server, settings.serve, work_dir(root)) as connect:
        runs += evaluated(root, measuring, connect)
    runs += compared(root, [v.name for v in settings.variants], settings.evaluate.rescore, settings.evaluate.resamples)
    show_stages(runs)
    return runs
