"""Stages are cached by their key in the storage itself, made again when what they made is gone, retried when it helps."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from prefect import flow

from tasks import artifact, storage
from tasks.artifact import Artifact, provenance, table_of, write_table
from tasks.errors import InputError, StorageError
from tasks.stages import StageRun, run_stage, stage
from tests.flaky_s3 import flaky_s3

calls: list[str] = []
ROW = {"source": "a.pdf", "row": None, "reason": "empty", "detail": ""}


def _write(uri: str) -> dict[str, Artifact]:
    return {"made": write_table(table_of([ROW], "set_aside/1"), uri + "/made.parquet", "set_aside/1", provenance())}


@stage("make", retries=0)
def make(key: str, uri: str) -> dict[str, Artifact]:
    calls.append(key)
    return _write(uri)


@stage("breaks", retries=0)
def breaks(key: str, uri: str) -> dict[str, Artifact]:
    calls.append(key)
    if storage.is_file(uri):
        raise InputError("failing", file=uri)
    return _write(uri + "-made")


def _flow(body: Callable[[], Any]) -> Any:
    return flow(name="test")(body)()


def _make(root: str, key: str, *, refresh: bool = False) -> StageRun:
    return _flow(lambda: run_stage(make, root=root, key=key, uri=storage.join(root, "made", key), refresh=refresh))


@pytest.fixture(autouse=True)
def _no_calls() -> None:
    calls.clear()


def test_the_same_key_is_made_once(storage_root: str) -> None:
    first, second, other = _make(storage_root, "a"), _make(storage_root, "a"), _make(storage_root, "b")
    assert calls == ["make-a", "make-b"]
    assert [first.cached, second.cached, other.cached] == [False, True, False]
    assert second.artifacts == first.artifacts
    assert artifact.read_rows(second.artifacts["made"]) == [ROW]


def test_what_is_gone_is_made_again(storage_root: str) -> None:
    first = _make(storage_root, "a")
    storage.delete(first.artifacts["made"].uri)
    again = _make(storage_root, "a")
    assert not again.cached
    assert again.artifacts == first.artifacts
    assert _make(storage_root, "a").cached


def test_what_is_made_anew_and_fails_is_not_taken_from_before(storage_root: str) -> None:
    """It may have written over what it made before: the old result would name what is no longer there."""
    _make(storage_root, "a")
    failing = storage.join(storage_root, "failing")
    storage.write_bytes(failing, b"")
    with pytest.raises(InputError):
        _flow(lambda: run_stage(breaks, root=storage_root, key="b", uri=failing))
    storage.delete(failing)
    _flow(lambda: run_stage(breaks, root=storage_root, key="b", uri=failing))
    storage.write_bytes(failing, b"")
    with pytest.raises(InputError):
        _flow(lambda: run_stage(breaks, root=storage_root, key="b", uri=failing, refresh=True))
    storage.delete(failing)
    calls.clear()
    assert not _flow(lambda: run_stage(breaks, root=storage_root, key="b", uri=failing)).cached
    assert calls == ["breaks-b"]


def test_a_result_that_cannot_be_read_just_now_is_not_paid_for_again(
    s3_root: str, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "botocore.endpoint.time", SimpleNamespace(sleep=lambda seconds: None)
    )  # half a minute of backing off
    with flaky_s3(s3_server) as s3:
        monkeypatch.setenv("AWS_ENDPOINT_URL", s3.url)
        storage._client.cache_clear()
        try:
            first = _make(s3_root, "a")
            s3.failing = "/results/"
            with pytest.raises(StorageError, match="503"):
                _make(s3_root, "a")
            assert calls == ["make-a"]
            s3.failing = ""
            assert _make(s3_root, "a").artifacts == first.artifacts
            assert calls == ["make-a"]

            s3.failing = "/results/"  # who wants it made anew need not be able to read it
            assert not _make(s3_root, "a", refresh=True).cached
            assert calls == ["make-a", "make-a"]
        finally:
            storage._client.cache_clear()


def test_another_storage_knows_nothing_of_it(tmp_path: Any) -> None:
    _make(str(tmp_path / "one"), "a")
    assert not _make(str(tmp_path / "two"), "a").cached


@pytest.mark.parametrize(("error", "tries"), [(ConnectionResetError("gone"), 2), (InputError("bad row"), 1)])
def test_only_what_can_pass_is_tried_again(tmp_path: Any, error: Exception, tries: int) -> None:
    @stage("fragile", retries=1)
    def fragile(key: str, uri: str) -> dict[str, Artifact]:
        calls.append(key)
        raise error

    quick = fragile.with_options(retry_delay_seconds=0)
    with pytest.raises(type(error)):
        _flow(lambda: run_stage(quick, root=str(tmp_path), key="a", uri=str(tmp_path / "a")))
    assert len(calls) == tries


def test_results_hold_references_not_data(storage_root: str) -> None:
    made = _make(storage_root, "a").artifacts["made"]
    stored = [storage.read_bytes(f) for f in storage.iter_files(storage.join(storage_root, "results"))]
    assert any(made.sha256.encode() in content for content in stored)
    assert not any(b"a.pdf" in content for content in stored)
