"""What a collection with failed rollouts tells, and how many of its shards are under way at once."""

import json
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterKey,
)
from prefect.client.schemas.objects import Artifact as Shown
from prefect.states import State

from flows.collect import collect
from tasks import collect as shards
from tasks import config, failures
from tasks.collect import Shard, ShardReport
from tasks.errors import ConfigError
from tests.model_server import ModelServer, Reply, Status
from tests.small_collection import ingest_small, searcher


def _run(root: str, url: str, concurrency: int = 4, **chosen: Any) -> State[Any]:
    settings = config.CollectRun(
        storage=root,
        agent=config.Agent(protocol="tags", max_iterations=3),
        server=config.Server.model_validate(
            {"base_url": url, "model": "base", "max_retries": 0, "concurrency": concurrency}
        ),
        collect=config.Collect.model_validate({"split": "all", "shard_size": 4} | chosen),
    )
    return collect(settings, return_state=True)  # type: ignore[return-value]


def _tables(state: State[Any]) -> list[Shown]:
    """The tables of failed rollouts on a run's page."""
    of_run = ArtifactFilterFlowRunId(any_=[state.state_details.flow_run_id])
    chosen = ArtifactFilter(flow_run_id=of_run, key=ArtifactFilterKey(any_=[failures.KEY]))
    with get_client(sync_client=True) as client:
        return client.read_artifacts(artifact_filter=chosen)


def _piston_fails(request: dict[str, Any], call: int) -> Reply | Status:
    return Status(503) if "piston" in request["messages"][-1]["content"] else searcher(request, call)


def test_what_was_allowed_to_fail_is_told_too(
    tmp_path: Path, documents: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = str(tmp_path / "store")
    ingest_small(root, documents)
    with ModelServer(_piston_fails) as server:
        state = _run(root, server.url, samples=2, allow_failed_share=0.2)
        assert state.is_completed()
        (table,) = _tables(state)
        assert table.description == "2 of 20 rollouts failed (server_error 2). Retry redoes only these."
        rows = json.loads(str(table.data))
        assert [(row["question"], row["attempt"], row["reason"]) for row in rows] == [("q8", 1, "server_error")] * 2
        assert rows[0]["detail"].startswith("HTTP 503")
        said = capfd.readouterr().err
        assert "Failed rollouts: 2 of 20" in said
        assert "q8: HTTP 503" in said

        state = _run(root, server.url, samples=2)
        assert state.is_failed()
        (table,) = _tables(state)
        assert {row["attempt"] for row in json.loads(str(table.data))} == {2}

        server.script = searcher
        (table,) = _tables(_run(root, server.url, samples=2))
        assert (json.loads(str(table.data)), table.description) == (
            [],
            "None. The 2 that had failed before are finished.",
        )
        assert _tables(_run(root, server.url, samples=2)) == []


def test_a_long_table_is_cut_and_says_so(tmp_path: Path, documents: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "_MOST_ROWS", 7)
    root = str(tmp_path / "store")
    ingest_small(root, documents)

    def failing(request: dict[str, Any], call: int) -> Reply | Status:
        return Status(503) if "How heavy" in request["messages"][-1]["content"] else searcher(request, call)

    with ModelServer(failing) as server:
        state = _run(root, server.url, samples=2)
    assert "20 of 20 rollouts failed" in str(state.message)
    (table,) = _tables(state)
    assert len(json.loads(str(table.data))) == 7
    assert str(table.description).endswith("Retry redoes only these. 13 more are not listed.")


def test_no_more_shards_are_under_way_than_keep_the_gate_full(
    tmp_path: Path, documents: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, real = str(tmp_path / "store"), shards.run_shard
    ingest_small(root, documents)
    under_way = most = 0

    async def counted(shard: Shard, **given: Any) -> ShardReport:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        try:
            return await real(shard, **given)
        finally:
            under_way -= 1

    monkeypatch.setattr(shards, "run_shard", counted)
    with ModelServer(searcher) as server:
        assert _run(root, server.url, concurrency=1, shard_size=1).is_completed()
    assert most == 2  # of ten; without a bound all would be, waiting at the gate


def test_a_shard_that_cannot_pass_is_not_tried_again(
    tmp_path: Path, documents: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each try begins all its rollouts that have not finished anew, and they cost the same again."""
    root = str(tmp_path / "store")
    ingest_small(root, documents)
    tried: list[int] = []

    async def refused(shard: Shard, **given: Any) -> ShardReport:
        tried.append(shard.number)
        raise ConfigError("only the user can mend this")

    monkeypatch.setattr(shards, "run_shard", refused)
    with ModelServer(searcher) as server:
        state = _run(root, server.url, shard_size=10)
    assert "only the user can mend this" in str(state.message)
    assert tried == [0]
