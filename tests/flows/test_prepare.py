"""Training sets and exports are made of rollouts and pairs of one collection, whatever refs/ points to just then."""

from collections.abc import Callable
from pathlib import Path

import pytest

from flows.export import export
from flows.prepare import format_
from tasks import artifact, config, refs, storage
from tasks.artifact import Artifact
from tasks.errors import ArtifactError, EmptyError

NAMES = {"processed": "processed/4", "pairs": "pairs/3"}


def _processed(root: str, key: str) -> dict[str, Artifact]:
    """What a run of the stage leaves, without a row; no reference points to it yet."""
    tables = {name: artifact.table_of([], schema) for name, schema in NAMES.items()}
    return {
        name: artifact.write_table(
            table, storage.join(root, "processed", key, f"{name}.parquet"), NAMES[name], artifact.provenance()
        )
        for name, table in tables.items()
    }


def _format(root: str) -> None:
    with pytest.raises(EmptyError):  # they are taken, and there is nothing in them
        format_(config.FormatRun(storage=root))


def _export(root: str) -> None:
    export(config.ExportRun(storage=root, what="processed", target=f"{root}/out"))


@pytest.mark.parametrize("take", [_format, _export])
@pytest.mark.parametrize("saved", NAMES)
def test_of_a_process_that_is_under_way_nothing_is_taken(
    tmp_path: Path, saved: str, take: Callable[[str], None]
) -> None:
    root = str(tmp_path)
    old, new = _processed(root, "old"), _processed(root, "new")
    for name in NAMES:
        refs.save_ref(root, name, old[name])
    take(root)
    refs.save_ref(root, saved, new[saved])
    with pytest.raises(ArtifactError, match="processed, pairs that were not made together"):
        take(root)
    for name in NAMES:
        refs.save_ref(root, name, new[name])
    take(root)
