"""Stages are cached by their key in the storage itself, made again when what they made is gone, retried when it helps."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prefect import flow, task
from prefect.settings import PREFECT_TASKS_REFRESH_CACHE, temporary_settings

from tasks import artifact, storage
from tasks.artifact import Artifact, provenance, table_of, write_table
from tasks.errors import InputError, StorageError
from tasks.retries import may_pass
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


@stage("changes", retries=0)
def changes(key: str, uri: str) -> dict[str, Artifact]:
    """Other bytes each time; broken off with these written where a file `stop` lies."""
    calls.append(key)
    table = table_of([ROW | {"detail": str(len(calls))}], "set_aside/1")
    made = write_table(table, storage.join(uri, "made.parquet"), "set_aside/1", provenance())
    if storage.is_file(stop := storage.join(uri, "stop")):
        raise InputError("is there", file=stop)
    return {"made": made}


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


@pytest.mark.parametrize("why", ["it is asked for", "a setting says so", "it is gone"])
def test_what_is_made_anew_and_broken_off_is_not_taken_from_before(tmp_path: Path, why: str) -> None:
    """It has written over what it made before: the old result would name bytes that are no longer there."""
    root = str(tmp_path)
    uri = storage.join(root, "made")
    stop = storage.join(uri, "stop")

    def run(*, refresh: bool = False) -> StageRun:
        return _flow(lambda: run_stage(changes, root=root, key="a", uri=uri, refresh=refresh))

    first = run()
    assert run().cached
    if why == "it is gone":
        storage.delete(first.artifacts["made"].uri)
    storage.write_bytes(stop, b"")
    with (
        temporary_settings({PREFECT_TASKS_REFRESH_CACHE: why == "a setting says so"}),
        pytest.raises(InputError, match="is there"),
    ):
        run(refresh=why == "it is asked for")
    storage.delete(stop)
    calls.clear()
    again = run()
    assert not again.cached
    assert calls == ["changes-a"]
    assert artifact.read_rows(again.artifacts["made"]) == [ROW | {"detail": "1"}]
    assert run().cached


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


CAN_PASS = pytest.mark.parametrize(
    ("error", "tries"),
    [(ConnectionResetError("gone"), 2), (StorageError("gone"), 2), (InputError("bad row"), 1), (TypeError("ours"), 1)],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)


@CAN_PASS
def test_only_what_can_pass_is_tried_again(tmp_path: Path, error: Exception, tries: int) -> None:
    @stage("fragile", retries=1)
    def fragile(key: str, uri: str) -> dict[str, Artifact]:
        calls.append(key)
        raise error

    quick = fragile.with_options(retry_delay_seconds=0)
    with pytest.raises(type(error)):
        _flow(lambda: run_stage(quick, root=str(tmp_path), key="a", uri=str(tmp_path / "a")))
    assert len(calls) == tries


@CAN_PASS
async def test_only_what_can_pass_is_tried_again_in_an_event_loop(error: Exception, tries: int) -> None:
    @task(retries=1, retry_condition_fn=may_pass, persist_result=False)
    async def fragile() -> None:
        calls.append("fragile")
        raise error

    @flow
    async def asking() -> None:
        await fragile()

    with pytest.raises(type(error)):
        await asking()
    assert len(calls) == tries


def test_results_hold_references_not_data(storage_root: str) -> None:
    made = _make(storage_root, "a").artifacts["made"]
    stored = [storage.read_bytes(f) for f in storage.iter_files(storage.join(storage_root, "results"))]
    assert any(made.sha256.encode() in content for content in stored)
    assert not any(b"a.pdf" in content for content in stored)
