"""Training sets are made of rollouts and pairs of one collection, whatever refs/ points to just then."""

from pathlib import Path

import pytest

from flows.prepare import format_
from tasks import artifact, config, refs, storage
from tasks.artifact import Artifact
from tasks.errors import ArtifactError, EmptyError

NAMES = {"processed": "processed/3", "pairs": "pairs/3"}


def _processed(root: str, key: str) -> dict[str, Artifact]:
    """What a run of the stage leaves, without a row; no reference points to it yet."""
    tables = {name: artifact.table_of([], schema) for name, schema in NAMES.items()}
    return {
        name: artifact.write_table(
            table, storage.join(root, "processed", key, f"{name}.parquet"), NAMES[name], artifact.provenance()
        )
        for name, table in tables.items()
    }


@pytest.mark.parametrize("saved", NAMES)
def test_of_a_process_that_is_under_way_nothing_is_taken(tmp_path: Path, saved: str) -> None:
    root = str(tmp_path)
    old, new = _processed(root, "old"), _processed(root, "new")
    for name in NAMES:
        refs.save_ref(root, name, old[name])
    with pytest.raises(EmptyError):  # it is taken, and there is nothing in it
        format_(config.FormatRun(storage=root))
    refs.save_ref(root, saved, new[saved])
    with pytest.raises(ArtifactError, match="pairs of other rollouts than the processed ones"):
        format_(config.FormatRun(storage=root))
    for name in NAMES:
        refs.save_ref(root, name, new[name])
    with pytest.raises(EmptyError):
        format_(config.FormatRun(storage=root))
