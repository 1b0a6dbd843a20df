"""finetune: training set → LoRA adapter. merge: adapter and base → one model.

drag finetune sft --training-set sft_best --epochs 2 --lr 1e-3
drag finetune sft --config deployments/recipes/finetune-ddp.yaml
drag merge
"""

from collections.abc import Sequence

from flows.form import settings_flow
from flows.summary import show_picture, show_stages, work_dir
from tasks import artifact, config, plots, storage
from tasks.artifact import Artifact, load_ref
from tasks.cache import stage_key
from tasks.model import fetch_model, model_fingerprint
from tasks.stage_tasks import finetune_adapter, merge_adapter
from tasks.stages import StageRun, run_stage
from tasks.training.launch import world_size


def finetuned(
    root: str,
    settings: config.Finetune,
    processes: config.Launch,
    model: str,
    training_set: Artifact,
    trusted: Sequence[str],
) -> StageRun:
    """Train an adapter; a killed training goes on from its last checkpoint, which lies below the stage's folder.

    Args:
        trusted: names of models whose own code may run.
    """
    # How many processes train changes the steps; where they run does not.
    facts = {"model": model_fingerprint(fetch_model(model, trusted)), "world_size": world_size(processes)}
    learned = settings.model_copy(update={"save_steps": 1})  # how often it is saved changes nothing that is learned
    key = stage_key(
        "tasks.training", settings={"finetune": learned}, inputs={"training_set": training_set}, facts=facts
    )
    run = run_stage(
        finetune_adapter,
        root=root,
        key=key,
        uri=storage.join(root, "adapters", key),
        settings=settings,
        processes=processes,
        model=model,
        trusted=trusted,
        training_set=training_set,
        work_dir=work_dir(root) / "training" / key,
    )
    for name, made in run.artifacts.items():
        artifact.save_ref(root, name, made)
    show_picture("Loss", plots.loss_curve(artifact.read_rows(run.artifacts["loss_curve"])))
    return run


@settings_flow(name="finetune", about=lambda settings: settings.training_set)
def finetune(settings: config.FinetuneRun) -> list[StageRun]:
    """Train an adapter on the newest training set of the chosen format."""
    root = storage.resolve(settings.storage)
    training_set, trusted = load_ref(root, settings.training_set), settings.trusted_remote_code
    runs = [finetuned(root, settings.finetune, settings.launch, settings.model, training_set, trusted)]
    show_stages(runs)
    return runs


@settings_flow(name="merge")
def merge(settings: config.MergeRun) -> list[StageRun]:
    """Merge the newest adapter into its base model."""
    root = storage.resolve(settings.storage)
    adapter, trusted = load_ref(root, "adapter"), settings.trusted_remote_code
    facts = {"model": model_fingerprint(fetch_model(settings.model, trusted))}
    key = stage_key("tasks.training.merge", inputs={"adapter": adapter}, facts=facts)
    uri = storage.join(root, "merged", key)
    runs = [
        run_stage(merge_adapter, root=root, key=key, uri=uri, model=settings.model, trusted=trusted, adapter=adapter)
    ]
    artifact.save_ref(root, "merged_model", runs[0].artifacts["merged_model"])
    show_stages(runs)
    return runs
