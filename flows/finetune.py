"""finetune: training set → LoRA adapter, or reward model. merge: either and its base → one model.

drag finetune sft --training-set sft_best --epochs 2 --lr 1e-3 --name sft
drag finetune sft --training-set sft_context --name context
drag finetune dpo --from-adapter sft --epochs 1 --lr 2e-4 --margin-scale 0.5
drag finetune reward --reward-loss pairs
drag finetune sft --config deployments/recipes/finetune-ddp.yaml
drag merge --adapter context
drag merge --source reward_model
"""

from collections.abc import Sequence

import pyarrow as pa
from prefect.runtime import flow_run
from rich.console import Console
from rich.markdown import Markdown

from flows.form import settings_flow
from flows.summary import show_markdown, show_picture, show_stages, work_dir
from tasks import adapter_names, artifact, config, plots, refs, storage
from tasks.artifact import Artifact
from tasks.cache import stage_key
from tasks.markdown import markdown_table
from tasks.model import fetch_model, model_fingerprint
from tasks.refs import load_ref
from tasks.stage_tasks import finetune_adapter, merge_adapter
from tasks.stages import StageRun, run_stage
from tasks.training.card import measures
from tasks.training.curve import summary
from tasks.training.launch import NOT_LEARNED, forget_checkpoints, world_size


def finetuned(
    root: str,
    settings: config.Finetune,
    processes: config.Launch,
    model: str,
    training_set: Artifact,
    trusted: Sequence[str],
    start: Artifact | None,
    name: str = "",
) -> StageRun:
    """Train by the settings' method; a killed training goes on from its last checkpoint, which lies below the stage's folder.

    Args:
        trusted: names of models whose own code may run.
        start: adapter to go on from.
        name: what the adapter is kept under; the method when empty.
    """
    # How many processes train changes the steps; where they run does not.
    facts = {
        "finetune": settings.model_dump(mode="json", exclude=NOT_LEARNED),
        "model": model_fingerprint(fetch_model(model, trusted)),
        "world_size": world_size(processes),
    }
    inputs = {"training_set": training_set} | ({"start": start} if start else {})
    key = stage_key("tasks.training.launch", inputs=inputs, facts=facts)
    uri, scratch = storage.join(root, "adapters", key), work_dir(root) / "training" / key
    run = run_stage(
        finetune_adapter,
        root=root,
        key=key,
        uri=uri,
        settings=settings,
        processes=processes,
        model=model,
        trusted=trusted,
        training_set=training_set,
        work_dir=scratch,
        start=start,
        images_root=root,
    )
    forget_checkpoints(uri, scratch)
    for kind, made in run.artifacts.items():
        if kind == "adapter":
            adapter_names.keep(root, made, name or settings.method)
        else:
            refs.save_ref(root, kind, made)
    (loss_curve,) = (made for name, made in run.artifacts.items() if name.endswith("loss_curve"))
    _show(artifact.read_table(loss_curve))
    return run


def _show(curve: pa.Table) -> None:
    """How training went, on the terminal and in the UI."""
    if curve.num_rows > 1:  # one point is no curve
        show_picture("Loss", plots.loss_curve(curve.to_pylist()))
    rows = [(name, f"{value:.4g}") for name, value in measures(summary(curve)).items() if value is not None]
    table = markdown_table(("", ""), rows, right=[1])
    show_markdown("Training", table)
    if not flow_run.parent_flow_run_id:
        Console(stderr=True).print(Markdown(table))


@settings_flow(name="finetune", about=lambda settings: settings.learned_from)
def finetune(settings: config.FinetuneRun) -> list[StageRun]:
    """Train on the newest training set of the chosen method: an adapter, or a reward model."""
    root = storage.resolve(settings.storage)
    training_set, trusted = load_ref(root, settings.learned_from), settings.trusted_remote_code
    start = adapter_names.chosen(root, settings.from_adapter)
    runs = [
        finetuned(root, settings.finetune, settings.launch, settings.model, training_set, trusted, start, settings.name)
    ]
    show_stages(runs)
    return runs


@settings_flow(name="merge")
def merge(settings: config.MergeRun) -> list[StageRun]:
    """Merge an adapter, or the newest reward model, into its base model."""
    root = storage.resolve(settings.storage)
    of_reward = settings.source == "reward_model"
    adapter = load_ref(root, "reward_model") if of_reward else adapter_names.named(root, settings.adapter)
    trusted = settings.trusted_remote_code
    facts = {"model": model_fingerprint(fetch_model(settings.model, trusted))}
    key = stage_key("tasks.training.merge", inputs={"adapter": adapter}, facts=facts)
    uri = storage.join(root, "merged", key)
    runs = [
        run_stage(merge_adapter, root=root, key=key, uri=uri, model=settings.model, trusted=trusted, adapter=adapter)
    ]
    for name, made in runs[0].artifacts.items():
        refs.save_ref(root, name, made)
    show_stages(runs)
    return runs
