"""Artifacts: what is written is read, on disk and on S3, and nothing else is."""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks import artifact, schemas, storage
from tasks.artifact import Artifact
from tasks.errors import ArtifactError, DragError

ROWS = [
    {"source": "a.pdf", "row": None, "reason": "empty_file", "detail": "0 bytes"},
    {"source": "ä\n中.jsonl", "row": 3, "reason": "bad_json", "detail": ""},
]


def _written(root: str, name: str = "x.parquet") -> Artifact:
    table = artifact.table_of(ROWS, "set_aside/1")
    return artifact.write_table(table, storage.join(root, name), "set_aside/1", artifact.provenance(stage="test"))


def test_a_table_comes_back(storage_root: str) -> None:
    written = _written(storage_root)
    assert (written.rows, written.schema) == (2, "set_aside/1")
    assert artifact.read_rows(written) == ROWS
    assert artifact.read_table(written, ["reason"]).to_pydict() == {"reason": ["empty_file", "bad_json"]}
    assert [t.to_pylist() for t in artifact.read_batches(written, rows=1)] == [[ROWS[0]], [ROWS[1]]]
    assert artifact.exists(written)


def test_the_same_work_gives_the_same_bytes_anywhere(storage_root: str, tmp_path: Path) -> None:
    here, there = _written(storage_root, "one.parquet"), _written(str(tmp_path / "other"), "two.parquet")
    assert here.sha256 == there.sha256
    assert storage.read_bytes(here.uri) == storage.read_bytes(there.uri)


_CELL = st.one_of(st.none(), st.text(st.characters(codec="utf-8"), max_size=8))


@settings(max_examples=20, deadline=None)
@given(
    parts=st.lists(
        st.lists(
            st.fixed_dictionaries(
                {
                    "source": _CELL,
                    "row": st.none() | st.integers(-(2**31), 2**31 - 1),
                    "reason": _CELL,
                    "detail": _CELL,
                }
            ),
            max_size=4,
        ),
        max_size=4,
    )
)
def test_tables_written_one_after_the_other_are_one_table(
    tmp_path_factory: pytest.TempPathFactory, parts: list
) -> None:
    uri = str(tmp_path_factory.mktemp("parts") / "x.parquet")
    tables = (artifact.table_of(rows, "set_aside/1") for rows in parts)
    written = artifact.write_tables(tables, uri, "set_aside/1", {})
    everything = [row for rows in parts for row in rows]
    assert written.rows == len(everything)
    assert artifact.read_rows(written) == everything


def test_a_folder_of_parts_is_one_table(storage_root: str) -> None:
    folder = storage.join(storage_root, "parts")
    assert artifact.read_parts(folder, "set_aside/1", ["row"]).to_pydict() == {"row": []}
    _written(folder, "2.parquet")
    _written(folder, "1.parquet")
    storage.write_bytes(storage.join(folder, "done.json"), b"{}")
    assert artifact.read_parts(folder, "set_aside/1").to_pylist() == ROWS + ROWS


def test_provenance_comes_back(storage_root: str, tmp_path: Path) -> None:
    pages = Artifact("elsewhere", "ab" * 32, 1, "pages/2")
    facts = artifact.provenance({"pages": pages}, settings={"k": 3})
    assert facts["inputs"] == {"pages": "ab" * 32}
    assert facts["packages"]["pyarrow"] == pa.__version__
    table = artifact.write_table(
        artifact.table_of(ROWS, "set_aside/1"), storage.join(storage_root, "x.parquet"), "set_aside/1", facts
    )
    (tmp_path / "made").mkdir()
    folder = artifact.write_folder(tmp_path / "made", storage.join(storage_root, "i"), "index/1", 0, facts)
    assert artifact.read_provenance(table) == artifact.read_provenance(folder) == facts


def test_a_table_is_read_once_for_its_provenance(s3_root: str) -> None:
    written, other = _written(s3_root), _written(s3_root, "other.parquet")
    read: list[str] = []
    events = storage._client().meta.events
    events.register("before-call.s3.GetObject", lambda params, **_: read.append(params["url_path"]), unique_id="read")
    for _ in range(2):
        artifact.read_provenance(written)["stage"] = "nobody else sees this"
    assert artifact.read_provenance(other)["stage"] == artifact.read_provenance(written)["stage"] == "test"
    events.unregister("before-call.s3.GetObject", unique_id="read")
    assert len(read) == 2


@pytest.mark.parametrize(
    "rows",
    [
        [{"source": 1}],
        [{"row": "3"}],
        [{"row": 2**31}],
        [{"source": "half a pair \ud800"}],
        [{"source": "a", "sauce": "b"}],
        [{"source": "a"}, {"source": "a", "sauce": "b"}],
    ],
)
def test_rows_of_another_type_are_refused(rows: list[dict[str, object]]) -> None:
    with pytest.raises(ArtifactError, match="not set_aside/1"):
        artifact.table_of(rows, "set_aside/1")


@pytest.mark.parametrize(
    "table",
    [
        pa.table({"source": ["a"]}),
        artifact.table_of(ROWS, "set_aside/1").append_column("more", pa.array([1, 2])),
        artifact.table_of(ROWS, "set_aside/1").set_column(1, "row", pa.array(["x", "y"])),
    ],
)
def test_tables_of_another_schema_are_refused(table: pa.Table, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not set_aside/1"):
        artifact.write_table(table, str(tmp_path / "x.parquet"), "set_aside/1", {})
    assert not list(tmp_path.iterdir())


def test_undeclared_schemas_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="nonsense/1"):
        artifact.table_of(ROWS, "nonsense/1")
    with pytest.raises(ArtifactError, match="nonsense/1"):
        artifact.write_table(pa.table({}), str(tmp_path / "x.parquet"), "nonsense/1", {})
    with pytest.raises(ArtifactError, match="nonsense/1"):
        artifact.write_folder(tmp_path, str(tmp_path / "y"), "nonsense/1", 0, {})
    with pytest.raises(ArtifactError, match="nonsense/1"):
        artifact.read_table(Artifact(str(tmp_path), "", 0, "nonsense/1"))


def test_what_is_missing_altered_or_foreign_is_refused(storage_root: str) -> None:
    written = _written(storage_root)
    other = artifact.write_table(
        artifact.table_of(ROWS[:1], "set_aside/1"), storage.join(storage_root, "y.parquet"), "set_aside/1", {}
    )
    with pytest.raises(ArtifactError, match="make it again"):
        artifact.read_table(replace(written, schema="pages/2"))
    storage.write_bytes(written.uri, storage.read_bytes(other.uri))
    for read in (artifact.read_table, artifact.read_provenance, lambda a: list(artifact.read_batches(a))):
        with pytest.raises(ArtifactError, match="hashes to"):
            read(written)
    storage.delete(written.uri)
    assert not artifact.exists(written)
    for read in (artifact.read_table, artifact.read_provenance, lambda a: list(artifact.read_batches(a))):
        with pytest.raises(ArtifactError, match="does not exist"):
            read(written)


@pytest.mark.parametrize("damage", [b"", b"PAR1", b"PAR1" + b"\0" * 40 + b"PAR1"])
def test_a_damaged_part_is_named(storage_root: str, damage: bytes) -> None:
    storage.write_bytes(storage.join(storage_root, "bad.parquet"), damage)
    with pytest.raises(ArtifactError, match=r"bad\.parquet"):
        artifact.read_parts(storage_root, "set_aside/1")


def test_a_part_that_others_wrote_is_named(storage_root: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": [1]}), tmp_path / "x.parquet")
    storage.write_bytes(storage.join(storage_root, "x.parquet"), (tmp_path / "x.parquet").read_bytes())
    with pytest.raises(ArtifactError, match="a table that DRAG did not write"):
        artifact.read_parts(storage_root, "set_aside/1")


def _folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def _files(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_a_folder_comes_back(storage_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRAG_CACHE", str(tmp_path / "cache"))
    made = {"meta.json": b"{}", ".managed.json": b"[]", "deep/x.bin": b"\0"}
    uri = storage.join(storage_root, "index")
    written = artifact.write_folder(_folder(tmp_path / "one", made), uri, "index/1", 7, {"a": 1})
    fetched = _files(artifact.fetch_folder(written))
    assert {name: data for name, data in fetched.items() if name != "provenance.json"} == made
    assert json.loads(storage.read_bytes(uri + ".artifact.json"))["sha256"] == written.sha256

    # The same place with other content: nothing of the old stays.
    again = artifact.write_folder(_folder(tmp_path / "two", {"other": b"1"}), uri, "index/1", 1, {})
    assert set(_files(artifact.fetch_folder(again))) == {"other", "provenance.json"}

    # Nor what a killed process had half written.
    if not storage.is_s3(uri):
        (Path(uri) / ".weights.bin.12.34.tmp").write_bytes(b"half")
        assert artifact.write_folder(tmp_path / "two", uri, "index/1", 1, {}) == again
        assert set(_files(Path(uri))) == {"other", "provenance.json"}


def test_a_folder_made_where_it_is_to_lie_stays(tmp_path: Path) -> None:
    made = _folder(tmp_path / "index", {"a": b"1"})
    written = artifact.write_folder(made, str(made), "index/1", 1, {})
    assert set(_files(artifact.fetch_folder(written))) == {"a", "provenance.json"}


def test_a_folder_that_is_missing_or_altered_is_refused(
    storage_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRAG_CACHE", str(tmp_path / "cache"))
    uri = storage.join(storage_root, "index")
    written = artifact.write_folder(_folder(tmp_path / "one", {"a": b"1"}), uri, "index/1", 1, {})
    with pytest.raises(ArtifactError, match="not one of"):
        artifact.fetch_folder(replace(written, schema="pages/2"))
    if storage.is_s3(uri):  # a local folder is used where it lies, and engines leave lock files in it
        storage.write_bytes(storage.join(uri, "a"), b"2")
        with pytest.raises(ArtifactError, match="hashes to"):
            artifact.fetch_folder(written)
        assert not list((tmp_path / "cache" / "folders").iterdir())
    storage.delete(uri)
    with pytest.raises(ArtifactError, match="does not exist"):
        artifact.fetch_folder(written)


def test_a_folder_that_was_written_over_is_no_longer_the_old_one(storage_root: str, tmp_path: Path) -> None:
    uri = storage.join(storage_root, "index")
    old = artifact.write_folder(_folder(tmp_path / "one", {"a": b"1"}), uri, "index/1", 1, {})
    assert artifact.exists(old)
    new = artifact.write_folder(_folder(tmp_path / "two", {"a": b"2"}), uri, "index/1", 1, {})
    assert (artifact.exists(old), artifact.exists(new)) == (False, True)
    with pytest.raises(ArtifactError, match="no longer holds"):
        artifact.fetch_folder(old)


def test_a_folder_whose_writing_was_cut_off_is_neither_the_old_one_nor_the_new(tmp_path: Path) -> None:
    uri, one, two = str(tmp_path / "index"), tmp_path / "one", tmp_path / "two"
    old = artifact.write_folder(_folder(one, {"a": b"1", "b": b"1"}), uri, "index/1", 1, {})
    with pytest.raises(DragError, match="cannot be written"):  # a file lies where a folder has to
        artifact.write_folder(_folder(two, {"a": b"2", "b/c": b"2"}), uri, "index/1", 1, {})
    assert (Path(uri) / "a").read_bytes() == b"2"
    assert not artifact.exists(old)
    with pytest.raises(ArtifactError, match="no longer holds"):
        artifact.fetch_folder(old)
    assert artifact.write_folder(one, uri, "index/1", 1, {}) == old
    assert _files(artifact.fetch_folder(old))["a"] == b"1"


def test_every_schema_has_a_version_and_survives_a_round_trip(tmp_path: Path) -> None:
    for name, schema in schemas.TABLES.items():
        assert name.partition("/")[2].isdigit()
        written = artifact.write_table(schema.empty_table(), str(tmp_path / "x.parquet"), name, {})
        assert artifact.read_table(written).schema.equals(schema)
