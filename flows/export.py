"""export: what was made → files for people and programs that know nothing of DRAG.

drag export trajectories FOLDER                        # trajectories.jsonl
drag export processed FOLDER                           # processed.jsonl, pairs.jsonl, stats.json
drag export training-sets FOLDER                       # sft_best_train.jsonl, sft_best_val.jsonl, dpo_train.jsonl, …
drag export training-sets FOLDER --layout hf           # a data set: Parquet, and a card
drag export adapter FOLDER                             # the newest, in PEFT's layout, with a model card
drag export adapter FOLDER --adapter NAME              # the one that was kept under a name
drag export reward-model FOLDER                        # alike

FOLDER may be an s3:// prefix. To put a data set or an adapter on a hub, with HF_TOKEN in the environment:

hf upload --repo-type dataset NAME FOLDER
hf upload NAME FOLDER
"""

import tempfile
from pathlib import Path
from typing import get_args

from rich.console import Console

from flows.form import settings_flow
from flows.summary import show_markdown
from tasks import adapter_names, artifact, config, storage
from tasks.artifact import load_ref
from tasks.errors import ArtifactError
from tasks.exchange.adapter import export_adapter
from tasks.exchange.export import export_tables

_TABLES = {
    "trajectories": ["trajectories"],
    "processed": ["processed", "pairs", "statistics"],
    "training-sets": list(get_args(config.FormatName)),
}


@settings_flow(name="export", about=lambda settings: settings.what)
def export(settings: config.ExportRun) -> dict[str, int]:
    """Write the newest of what is named; returns the rows of each file.

    Raises:
        ArtifactError: there is none of it yet.
    """
    root, target = storage.resolve(settings.storage), storage.resolve(settings.target)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if settings.what in ("adapter", "reward-model"):
            of_reward = settings.what == "reward-model"
            made = load_ref(root, "reward_model") if of_reward else adapter_names.named(root, settings.adapter)
            export_adapter(made, folder)
            written = {path.name: 1 for path in sorted(folder.iterdir())}
        else:
            wanted = _TABLES[settings.what]
            tables = {name: load_ref(root, name) for name in wanted if artifact.has_ref(root, name)}
            if not tables:
                raise ArtifactError(f"{root} holds no {settings.what} yet; run the stage that makes them first")
            written = export_tables(tables, settings.layout, folder)
        storage.upload_folder(folder, target)
    lines = [f"| {name} | {rows:,} |" for name, rows in written.items()]
    show_markdown("Exported", "\n".join([f"To {target}", "", "| file | rows |", "| --- | ---: |", *lines]))
    for name, rows in written.items():
        Console(stderr=True).print(f"{storage.join(target, name)} ({rows:,})", soft_wrap=True, highlight=False)
    return written
