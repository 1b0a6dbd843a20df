"""Storage: the same behaviour on a local folder and on a real S3 server."""

import resource
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks import storage
from tasks.errors import ArtifactError, ConfigError, DragError, StorageError


def test_what_is_written_is_read(storage_root: str) -> None:
    uri = storage.join(storage_root, "a", "b.bin")
    storage.write_bytes(uri, b"\x00one")
    assert storage.read_bytes(uri) == b"\x00one"
    storage.write_bytes(uri, b"")
    assert storage.read_bytes(uri) == b""


_NAME = st.text(alphabet="aé .-_%+&?#中", min_size=1, max_size=12).filter(lambda n: n.strip(" .") == n)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.sets(_NAME, min_size=1, max_size=4), data=st.binary(max_size=64))
def test_any_name_comes_back_from_the_listing(storage_root: str, names: set[str], data: bytes) -> None:
    folder = storage.join(storage_root, "names")
    storage.delete(folder)
    for name in names:
        storage.write_bytes(storage.join(folder, name), data)
    assert sorted(storage.iter_files(folder)) == sorted(storage.join(folder, name) for name in names)
    assert all(storage.read_bytes(file) == data for file in storage.iter_files(folder))


def test_listing_is_of_the_file_or_of_the_folder_and_of_no_neighbour(storage_root: str) -> None:
    for name in ("run/b", "run/a/c", "run-2/a", "run.json", "ru"):
        storage.write_bytes(storage.join(storage_root, name), b"x")
    run = storage.join(storage_root, "run")
    below = [storage.join(run, "a/c"), storage.join(run, "b")]
    assert list(storage.iter_files(run)) == below
    assert list(storage.iter_files(run + "/")) == below
    assert list(storage.iter_files(storage.join(run, "b"))) == [storage.join(run, "b")]
    assert list(storage.iter_files(storage.join(storage_root, "nothing"))) == []


def test_exists_and_is_file(storage_root: str) -> None:
    storage.write_bytes(storage.join(storage_root, "folder/file"), b"x")
    folder, file, neighbour = (storage.join(storage_root, n) for n in ("folder", "folder/file", "fold"))
    assert [storage.exists(u) for u in (folder, file, neighbour)] == [True, True, False]
    assert [storage.is_file(u) for u in (folder, file, neighbour)] == [False, True, False]


def test_delete_leaves_nothing_and_takes_no_neighbour(storage_root: str) -> None:
    for name in ("run/a", "run/.hidden", "run/deep/b", "run-2/a"):
        storage.write_bytes(storage.join(storage_root, name), b"x")
    storage.delete(storage.join(storage_root, "run"))
    storage.delete(storage.join(storage_root, "run"))
    assert not storage.exists(storage.join(storage_root, "run"))
    assert storage.exists(storage.join(storage_root, "run-2"))
    if not storage.is_s3(storage_root):
        assert not (Path(storage_root) / "run").exists()


def test_a_folder_comes_back_whole_with_its_dot_files(storage_root: str, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for name, data in {".managed.json": b"{}", "deep/er/x": b"1", "empty": b""}.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(data)
    uri = storage.join(storage_root, "folder")
    storage.upload_folder(source, uri)
    storage.download_folder(uri, target)
    found = {p.relative_to(target).as_posix(): p.read_bytes() for p in target.rglob("*") if p.is_file()}
    assert found == {".managed.json": b"{}", "deep/er/x": b"1", "empty": b""}


def test_what_is_not_there_is_named(storage_root: str) -> None:
    uri = storage.join(storage_root, "gone")
    with pytest.raises(ArtifactError, match="gone does not exist"):
        storage.read_bytes(uri)
    storage.write_bytes(uri, b"a file now")
    with pytest.raises(ArtifactError, match="below does not exist"):
        storage.read_bytes(storage.join(uri, "below"))


def test_readers_never_see_half_a_write(storage_root: str) -> None:
    uri, versions = storage.join(storage_root, "busy"), [bytes([n]) * 200_000 for n in range(8)]
    storage.write_bytes(uri, versions[0])
    writers = [threading.Thread(target=storage.write_bytes, args=(uri, data)) for data in versions]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert storage.read_bytes(uri) in versions
        assert list(storage.iter_files(storage_root)) == [uri]
    for writer in writers:
        writer.join()


def test_a_fingerprint_is_of_names_and_contents(storage_root: str) -> None:
    folder = storage.join(storage_root, "in")
    storage.write_bytes(storage.join(folder, "a"), b"1")
    storage.write_bytes(storage.join(folder, "b"), b"2")
    before = storage.fingerprint(folder)
    storage.write_bytes(storage.join(folder, "b"), b"2")
    assert storage.fingerprint(folder) == before
    storage.write_bytes(storage.join(folder, "b"), b"3")
    assert storage.fingerprint(folder) != before
    storage.delete(storage.join(folder, "b"))
    storage.write_bytes(storage.join(folder, "c"), b"2")
    assert storage.fingerprint(folder) != before


def test_on_s3_a_fingerprint_reads_no_content_and_is_the_same_under_every_prefix(s3_root: str) -> None:
    for prefix in ("here", "there"):
        storage.write_bytes(storage.join(s3_root, prefix, "é.pdf"), b"1")
    read: list[str] = []
    events = storage._client().meta.events
    events.register(
        "before-call.s3.GetObject", lambda **call: read.append(call["params"]["url_path"]), unique_id="read"
    )
    here = storage.fingerprint(storage.join(s3_root, "here"))
    there = storage.fingerprint(storage.join(s3_root, "there"))
    assert read == []
    storage.read_bytes(storage.join(s3_root, "here", "é.pdf"))
    events.unregister("before-call.s3.GetObject", unique_id="read")
    assert len(read) == 1
    assert here == there


def test_relative_names_do_not_depend_on_how_the_root_is_written(
    storage_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    storage.write_bytes(storage.join(storage_root, "in/deep/a"), b"1")
    folder = storage.join(storage_root, "in")
    roots = [folder, folder + "/"]
    if not storage.is_s3(storage_root):
        roots += ["storage/in", "./storage//in/"]
    for root in roots:
        assert [storage.relative(file, root) for file in storage.iter_files(root)] == ["deep/a"]
        assert storage.fingerprint(root) == storage.fingerprint(folder)
    file = storage.join(folder, "deep/a")
    assert storage.relative(file, file) == "a"


@pytest.mark.parametrize(("endpoint", "kind"), [("not an address", ConfigError), ("http://127.0.0.1:9", StorageError)])
def test_an_endpoint_that_is_not_there(
    endpoint: str, kind: type[DragError], s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setattr("botocore.endpoint.time.sleep", lambda seconds: None)  # half a minute of backing off
    storage._client.cache_clear()
    try:
        with pytest.raises(kind, match="AWS_ENDPOINT_URL"):
            storage.exists("s3://bucket/x")
    finally:
        storage._client.cache_clear()


@pytest.mark.parametrize("uri", ["s3://", "s3:///key"])
def test_no_bucket(uri: str, s3_server: str) -> None:
    with pytest.raises(ConfigError, match="names no bucket"):
        storage.exists(uri)


def test_an_s3_that_refuses_says_what_to_check(s3_server: str) -> None:
    for action in (storage.exists, storage.read_bytes, storage.delete):
        with pytest.raises(ConfigError, match=r"no-such-bucket.*AWS_ENDPOINT_URL"):
            action("s3://no-such-bucket/x")
    with pytest.raises(ConfigError, match="no-such-bucket"):
        storage.write_bytes("s3://no-such-bucket/x", b"")


def test_a_local_write_that_cannot_be_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DragError, match="cannot be written"):
        storage.write_bytes(str(tmp_path / "file" / "below"), b"x")


_AS_SOMEBODY_ELSE = """
import os, sys
from tasks import pdf, storage
from tasks.errors import ConfigError
import pymupdf
if os.geteuid() == 0:
    os.seteuid(65534)
print(pdf.read_pdf(sys.argv[1], 60).refused)
reads = (storage.read_bytes, lambda uri: list(storage.read_lines(uri)))
for action in (*reads, storage.is_file, storage.delete, lambda uri: list(storage.iter_files(uri))):
    try:
        print(action(sys.argv[1]))
    except ConfigError as error:
        print(error)
"""


def test_a_local_file_that_may_not_be_read_is_named_and_a_pdf_that_may_not_is_set_aside(tmp_path: Path) -> None:
    file = tmp_path / "closed" / "a.pdf"
    file.parent.mkdir()
    file.write_bytes(b"")
    file.parent.chmod(0)
    try:
        done = subprocess.run([sys.executable, "-c", _AS_SOMEBODY_ELSE, file], capture_output=True, text=True)
    finally:
        file.parent.chmod(0o700)
    assert done.returncode == 0, done.stderr
    refused, *said = done.stdout.splitlines()
    assert refused.startswith("('unreadable', \"PermissionError:")
    for verb, line in zip(("read", "read", "looked for", "deleted", "listed"), said, strict=True):
        assert line.startswith(f"{file} cannot be {verb}: Permission denied")
    assert file.exists()


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="a file that cannot be read is Linux's")
def test_a_disk_that_fails_may_be_there_again() -> None:
    with pytest.raises(StorageError, match="mem cannot be read: Input/output error"):
        storage.read_bytes("/proc/self/mem")


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        with pytest.raises(StorageError, match="cannot be written: File too large"):
            storage.write_bytes(str(tmp_path / "part.parquet"), bytes(4096))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert list(tmp_path.iterdir()) == []


_CUT_OFF = """
import os, signal, sys, time
from tasks import storage

def stop(file):
    print("written", flush=True)
    time.sleep(600)

os.fsync = stop
storage.write_bytes(sys.argv[1], b"half")
"""


def test_what_a_killed_process_left_half_written_goes_and_what_a_live_one_writes_stays(tmp_path: Path) -> None:
    writers = []
    try:
        for name in ("dead", "live"):
            command = [sys.executable, "-c", _CUT_OFF, str(tmp_path / "below" / name)]
            writers.append(subprocess.Popen(command, stdout=subprocess.PIPE))
        for writer in writers:
            assert writer.stdout
            assert writer.stdout.readline() == b"written\n"
        writers[0].kill()
        writers[0].wait(60)
        (tmp_path / ".managed.tmp").write_bytes(b"no file of ours")
        assert len(list(tmp_path.rglob("*.tmp"))) == 3
        storage.clear_unfinished(str(tmp_path))
        assert [path.name.split(".")[1] for path in sorted(tmp_path.rglob("*.tmp"))] == ["managed", "live"]
    finally:
        for writer in writers:
            writer.kill()
            writer.wait(60)


def test_join_and_resolve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert storage.join("s3://b/", "/x/", "y.parquet") == "s3://b/x/y.parquet"
    assert storage.join("/", "x") == "/x"
    monkeypatch.chdir(tmp_path)
    assert storage.resolve("data") == str(tmp_path / "data")
    assert storage.resolve("s3://b/prefix/") == "s3://b/prefix"


@pytest.mark.parametrize(
    ("uri", "root", "name"),
    [
        ("/data/drag/index/abc", "/data/drag", "index/abc"),
        ("/data/drag/index/abc", "/data/drag/", "index/abc"),
        ("s3://bucket/drag/index/abc", "s3://bucket/drag/", "index/abc"),
        ("s3://bucket/index/abc", "s3://bucket", "index/abc"),
        ("/data/drag-2/index/abc", "/data/drag", "/data/drag-2/index/abc"),
        ("s3://bucket/drag-2/index", "s3://bucket/drag", "s3://bucket/drag-2/index"),
        ("s3://bucket/drag/index", "/data/drag", "s3://bucket/drag/index"),
        ("/data/drag", "/data/drag", "/data/drag"),
    ],
)
def test_what_lies_below_a_root_is_named_without_it(uri: str, root: str, name: str) -> None:
    assert storage.portable(uri, root) == name
    assert storage.located(name, root) == uri


def test_a_root_in_the_working_folder_has_the_names_of_the_whole_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.portable("drag/index", "drag") == storage.portable(f"{tmp_path}/drag/index", "drag") == "index"
    assert storage.portable("other/index", "drag") == f"{tmp_path}/other/index"
    assert storage.located("index", "drag") == f"{tmp_path}/drag/index"


def test_files_behind_links_are_listed_once_and_not_in_circles(tmp_path: Path) -> None:
    docs, archive = tmp_path / "docs", tmp_path / "archive"
    (docs / "2024").mkdir(parents=True)
    (archive / "old").mkdir(parents=True)
    (archive / "old" / "b.pdf").write_bytes(b"b")
    (docs / "2024" / "a.pdf").write_bytes(b"a")
    for link, target in (
        (docs / "2019", archive),
        (docs / "2020", archive / "old"),  # what is behind it came with 2019
        (docs / "latest", docs / "2024"),
        (docs / "up", tmp_path),
        (archive / "back", docs),
        (archive / "itself", archive),
        (docs / "nowhere", tmp_path / "gone"),
        (docs / "round", docs / "round"),
    ):
        link.symlink_to(target)
    found = [storage.relative(uri, str(docs)) for uri in storage.iter_files(str(docs))]
    assert found == ["2019/old/b.pdf", "2024/a.pdf"]
    assert list(storage.iter_files(str(docs / "round"))) == []
    before = storage.fingerprint(str(docs))
    (archive / "old" / "b.pdf").write_bytes(b"another")
    assert storage.fingerprint(str(docs)) != before


_LIST_AS_SOMEBODY_ELSE = """
import os, sys
from tasks import storage
from tasks.errors import ConfigError
from tasks.documents import _pdf_files
if os.geteuid() == 0:
    os.seteuid(65534)
aside = []
print(list(_pdf_files(sys.argv[1], aside)), [(one.source, one.reason) for one in aside], len(storage.fingerprint(sys.argv[1])))
try:
    list(storage.iter_files(sys.argv[1]))
except ConfigError as error:
    print(error)
"""


def test_documents_in_a_folder_that_may_not_be_listed_are_told_of_and_the_others_read() -> None:
    with tempfile.TemporaryDirectory() as made:  # pytest's own are for nobody else
        folder = Path(made)
        folder.chmod(0o755)
        (folder / "a.pdf").write_bytes(b"a")
        (folder / "lost+found").mkdir(mode=0)
        try:
            done = subprocess.run(
                [sys.executable, "-c", _LIST_AS_SOMEBODY_ELSE, folder], capture_output=True, text=True
            )
        finally:
            (folder / "lost+found").chmod(0o700)
    assert done.stdout.splitlines() == [
        "['a.pdf'] [('lost+found', 'unreadable')] 64",
        f"{folder} cannot be listed: Permission denied; check the path, and who may do so",
    ], done.stderr
