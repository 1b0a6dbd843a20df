"""References: to the newest of a kind, of a loop first, and true in a copy of the storage root."""

from dataclasses import replace
from pathlib import Path

import pytest

from tasks import artifact, refs, storage
from tasks.artifact import Artifact
from tasks.errors import ArtifactError

ROWS = [{"source": "a.pdf", "row": None, "reason": "not_pdf", "detail": ""}]


def test_a_reference_points_to_the_newest(storage_root: str) -> None:
    with pytest.raises(ArtifactError, match="holds no pages yet"):
        refs.load_ref(storage_root, "pages")
    for sha in ("1", "2"):
        pages = Artifact("s3://b/x.parquet", sha, 3, "pages/2")
        refs.save_ref(storage_root, "pages", pages)
        assert refs.load_ref(storage_root, "pages") == pages


def test_refs_of_a_copied_root_point_into_the_copy(storage_root: str, tmp_path: Path) -> None:
    table = artifact.table_of(ROWS, "set_aside/1")
    own = artifact.write_table(table, storage.join(storage_root, "x.parquet"), "set_aside/1", {})
    other = Artifact("s3://b/x.parquet", "1", 3, "pages/2")
    copy, place = storage_root + "-copy", "nights/dt=2026-11-24/abc"
    with refs.refs_of("loop"):
        refs.save_ref(storage_root, "own", own)
        refs.save_ref(storage_root, "own", own, storage.join(storage_root, place))
        refs.save_ref(storage_root, "other", other)
    storage.download_folder(storage_root, tmp_path / "on-its-way")
    storage.upload_folder(tmp_path / "on-its-way", copy)
    storage.delete(storage_root)
    for loop in ("loop", ""):
        with refs.refs_of(loop):
            for found in (refs.load_ref(copy, "own"), refs.load_ref(copy, "own", storage.join(copy, place))):
                assert found == replace(own, uri=storage.join(copy, "x.parquet"))
                assert artifact.read_rows(found) == ROWS
            assert refs.load_ref(copy, "other") == other
