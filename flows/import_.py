"""import: files of the reference pipeline, of a data set or of PEFT → what the next stages take.

drag import trajectories trajectories.jsonl --protocol tags           # then: drag process
drag import processed processed.jsonl                                 # then: drag format
drag import sft_best sft_best_train.jsonl sft_best_val.jsonl          # then: drag finetune sft
drag import adapter checkpoints/sft/final --model MODEL               # then: drag evaluate, drag infer --adapter

A folder that `drag export` wrote with `--layout hf` can stand for the file. The fields that are read are listed in
tasks/exchange/trajectories.py and tasks/exchange/training_sets.py. Rollouts of others are told anew as the agent's, with the
texts, or the images, of the pages that they saw: ingest these first, from PDFs for images, or import with `--observation none`.
Our own rows' page images are taken from what was exported with them.
"""

from pydantic import BaseModel

from flows.form import settings_flow
from flows.ingest import show_set_aside
from flows.summary import show_stages
from tasks import adapter_names, config, refs, storage
from tasks.cache import content_fingerprint, stage_key
from tasks.errors import InputError
from tasks.exchange import exported, importing
from tasks.exchange.images import images_beside
from tasks.exchange.target import refuse_cut_off
from tasks.model import fetch_model, model_fingerprint
from tasks.refs import load_ref
from tasks.stage_tasks import import_artifacts
from tasks.stages import StageRun, run_stage

# what an import leaves without: it would be of what was there before
_GONE = {"adapter": ["loss_curve"], "processed": ["statistics"]}


@settings_flow(name="import", about=lambda settings: settings.what)
def import_(settings: config.ImportRun) -> list[StageRun]:
    """Take what others made, as the newest of its kind."""
    root = storage.resolve(settings.storage)
    sources = [source if storage.is_s3(source) else storage.resolve(source) for source in settings.source]
    if missing := [source for source in sources if not storage.exists(source)]:
        raise InputError("there is no such file or folder; check the path", file=missing[0])
    for source in sources:
        refuse_cut_off(source)
    settings = settings.model_copy(update={"storage": root, "source": sources})
    pages, questions = (load_ref(root, name) if refs.has_ref(root, name) else None for name in ("pages", "questions"))
    counting: dict[str, BaseModel] = {"agent": settings.agent}
    facts: dict[str, object] = {"what": settings.what, "source": [content_fingerprint(source) for source in sources]}
    if settings.what == "adapter":
        module, inputs = "tasks.exchange.adapter", {}
        facts["model"] = model_fingerprint(fetch_model(settings.model, settings.trusted_remote_code))
    else:
        module, inputs = "tasks.exchange.importing", {made.schema: made for made in (pages, questions) if made}
        counting["process"] = importing.SCORING
        beside = exported.beside(sources[0])  # says what the rows were made with
        if shown := images_beside(sources[0]):  # their names are their hashes, but one may have been missing
            facts["images"] = content_fingerprint(shown)
        facts["provenance"] = beside and content_fingerprint(beside)
        facts["names"] = [source.rsplit("/", 1)[-1] for source in sources]
    key = stage_key(module, settings=counting, inputs=inputs, facts=facts)
    uri = storage.join(root, "imported", key)
    runs = [
        run_stage(import_artifacts, root=root, key=key, uri=uri, settings=settings, pages=pages, questions=questions)
    ]
    for name in _GONE.get(settings.what, ()):
        refs.drop_ref(root, name)
    for name, made in runs[0].artifacts.items():
        if name == "adapter":
            adapter_names.keep(root, made, settings.name)
        else:
            refs.save_ref(root, name, made)
    show_set_aside(runs)
    show_stages(runs)
    return runs
