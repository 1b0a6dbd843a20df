"""export: what was made → files for people and programs that know nothing of DRAG.

drag export pages FOLDER                               # pages.jsonl, which `drag ingest --ocr-file` takes: scans are read by then
drag export trajectories FOLDER                        # trajectories.jsonl
drag export mined FOLDER                               # mined.jsonl: queries that were mined, as rollouts of one turn
drag export processed FOLDER                           # processed.jsonl, pairs.jsonl, stats.json
drag export training-sets FOLDER                       # sft_best_train.jsonl, sft_best_val.jsonl, dpo_train.jsonl, …
drag export training-sets FOLDER --layout hf           # a data set: Parquet, and a card
drag export results FOLDER                             # results-base.jsonl, …, comparison.jsonl: as last compared
drag export adapter FOLDER                             # the newest, in PEFT's layout, with a model card
drag export adapter FOLDER --adapter NAME              # the one that was kept under a name
drag export reward-model FOLDER                        # alike

Page images that rows show go along: as images/<sha256>.png, or as the data set's configuration `images`.

FOLDER may be an s3:// prefix. It is for one of these: what is exported there again takes the place of the earlier export, and
what others put there stays. To put a data set or an adapter on a hub, with HF_TOKEN in the environment:

hf upload --repo-type dataset NAME FOLDER
hf upload NAME FOLDER
"""

from typing import get_args

from rich.console import Console

from flows.form import settings_flow
from flows.summary import show_markdown
from tasks import adapter_names, config, evaluate, folders, refs, storage
from tasks.artifact import Artifact, read_provenance
from tasks.errors import ArtifactError
from tasks.exchange.adapter import export_adapter
from tasks.exchange.export import export_tables
from tasks.exchange.target import put
from tasks.markdown import markdown_table
from tasks.refs import load_ref

_TABLES = {
    "pages": ["pages"],
    "trajectories": ["trajectories"],
    "mined": ["mined"],
    "processed": ["processed", "pairs", "statistics"],
    "training-sets": list(get_args(config.FormatName)),
}


def _made(root: str, what: str) -> dict[str, Artifact]:
    there = [name for name in _TABLES[what] if refs.has_ref(root, name)]
    if not there:
        raise ArtifactError(f"{root} holds no {what} yet; run the stage that makes them first")
    if what == "processed":
        return refs.load_together(root, there)
    return {name: load_ref(root, name) for name in there}


def _measured(root: str) -> dict[str, Artifact]:
    """The newest comparison, and the results of its runs: as they ran, and with their first queries ranked again."""
    comparison = load_ref(root, "comparison")
    compared: dict[str, str] = read_provenance(comparison)["inputs"]
    tables = {"comparison": comparison}
    for name in refs.ref_names(root):
        if name.startswith("results-"):
            results = load_ref(root, name)
            if results.schema != evaluate.SCHEMA:  # of an earlier version, so not of the newest comparison
                continue
            if {results.sha256, read_provenance(results)["inputs"].get("results")} & set(compared.values()):
                tables[name.replace(" ", "_")] = results
    there = {table.sha256 for table in tables.values()}
    if gone := [run for run, sha256 in compared.items() if sha256 not in there]:
        raise ArtifactError(
            f"{', '.join(gone)}: measured again since the newest comparison; run drag compare, naming all runs that it is to hold"
        )
    return tables


@settings_flow(name="export", about=lambda settings: settings.what)
def export(settings: config.ExportRun) -> dict[str, int]:
    """Write the newest of what is named; returns the rows of each file.

    Raises:
        ArtifactError: there is none of it yet.
        ConfigError, InputError: another export lies at the target, or files that no export wrote, as `put`.
    """
    root, target = storage.resolve(settings.storage), storage.resolve(settings.target)
    with folders.scratch("export") as folder:
        if settings.what in ("adapter", "reward-model"):
            of_reward = settings.what == "reward-model"
            made = load_ref(root, "reward_model") if of_reward else adapter_names.named(root, settings.adapter)
            export_adapter(made, folder)
            written = {path.name: 1 for path in sorted(folder.iterdir())}
        else:
            tables = _measured(root) if settings.what == "results" else _made(root, settings.what)
            written = export_tables(tables, settings.layout, folder, root)
        put(folder, target, settings.what)
    counts = ((name, f"{rows:,}") for name, rows in written.items())
    show_markdown("Exported", f"To {target}\n\n{markdown_table(('file', 'rows'), counts, right=[1])}")
    for name, rows in written.items():
        Console(stderr=True).print(f"{storage.join(target, name)} ({rows:,})", soft_wrap=True, highlight=False)
    return written
