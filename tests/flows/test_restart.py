"""A model server dies in the middle of a flow: the flow ends as if nothing had happened, and redoes no more than it must."""

import itertools
import json
import os
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.client.schemas.sorting import ArtifactSort

from flows import serving
from flows.collect import collect
from tasks import artifact, config, failures, serve, server_api, supervise
from tasks import collect as shards
from tasks.artifact import read_rows
from tasks.collect_run import OF_THE_SERVER
from tasks.errors import ConfigError, ServerError
from tasks.model import model_fingerprint
from tasks.network import free_port
from tasks.refs import load_ref
from tests.server_process import counts, server_process
from tests.small_collection import ingest_small
from tests.tiny_model import tiny_adapter, tiny_model

ROLLOUTS = 20


@pytest.fixture
def root(tmp_path: Path, documents: Path) -> str:
    ingest_small(str(tmp_path / "store"), documents)
    return str(tmp_path / "store")


@pytest.fixture
def dying(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """In the place of vLLM, the test server, the next one with the next of these flags."""
    flags: list[list[str]] = []
    numbers = itertools.count()

    def start(model: str, settings: config.Serve, work_dir: Path, port: int, **_: Any) -> Any:
        number = next(numbers)
        return server_process(tmp_path / f"server-{number}.log", port, *(flags[number] if number < len(flags) else []))

    monkeypatch.setattr(serve, "serving", start)
    monkeypatch.setattr(supervise, "_ASK_AGAIN_S", 0.1)
    monkeypatch.setattr(supervise, "_WATCH_EVERY_S", 0.2)
    monkeypatch.setattr(supervise, "_SILENT_S", 3.0)
    return flags


def _settings(root: str, tmp_path: Path, **vllm: Any) -> config.CollectRun:
    return config.CollectRun(
        storage=root,
        agent=config.Agent(protocol="tags"),
        server=config.Server(model=str(tiny_model(tmp_path / "model")), concurrency=4, max_retries=0),
        serve=config.Serve(**vllm),
        collect=config.Collect(split="all", samples=2, shard_size=3, flush_every=2),
    )


def _newest_table() -> list[dict[str, Any]]:
    """The rows that were told last of rollouts that failed."""
    with get_client(sync_client=True) as client:
        chosen = ArtifactFilter(key=ArtifactFilterKey(any_=[failures.KEY]))
        (table,) = client.read_artifacts(artifact_filter=chosen, sort=ArtifactSort.CREATED_DESC, limit=1)
    return json.loads(str(table.data))


def _attempts(root: str) -> Counter[tuple[str, str]]:
    """(rollout, status) of every stored attempt."""
    stored = artifact.read_parts(f"{root}/rollouts", shards.SCHEMA, ["rollout_id", "status"]).to_pylist()
    return Counter((row["rollout_id"], row["status"]) for row in stored)


@pytest.mark.parametrize("end", ["die", "ill", "hang"])
def test_a_collection_outlives_its_server(root: str, tmp_path: Path, dying: list[list[str]], end: str) -> None:
    dying += [["--end", end, "--end-after", "20"], ["--end", end, "--end-after", "6"]]
    collect(_settings(root, tmp_path))
    rows = read_rows(load_ref(root, "trajectories"))
    assert len(rows) == ROLLOUTS
    assert {row["outcome"] for row in rows} == {"answered"}
    assert max(row["attempt"] for row in rows) > 1
    attempts = _attempts(root)
    assert {n for (_, status), n in attempts.items() if status == "finished"} == {1}
    assert sum(status == "finished" for _, status in attempts) == ROLLOUTS


def test_with_no_restart_left_the_run_ends_and_the_next_goes_on(
    root: str, tmp_path: Path, dying: list[list[str]]
) -> None:
    dying += [["--end-after", "20"]]
    with pytest.raises(ServerError, match="max_restarts"):
        collect(_settings(root, tmp_path, max_restarts=0))
    kept = {rollout for rollout, status in _attempts(root) if status == "finished"}
    assert kept
    told = _newest_table()
    assert 0 < len(told) <= ROLLOUTS - len(kept)
    assert {row["reason"] for row in told} <= OF_THE_SERVER
    collect(_settings(root, tmp_path, max_restarts=0))
    attempts = _attempts(root)
    assert {attempts[rollout, "finished"] for rollout in kept} == {1}
    assert sum(status == "finished" for _, status in attempts) == ROLLOUTS


def test_a_server_that_died_once_too_often_may_cost_as_many_rollouts_as_are_allowed(
    root: str, tmp_path: Path, dying: list[list[str]]
) -> None:
    dying += [["--end-after", "20"]]
    settings = _settings(root, tmp_path, max_restarts=0)
    collect(settings.model_copy(update={"collect": settings.collect.model_copy(update={"allow_failed_share": 1.0})}))
    statuses = Counter(row["status"] for row in read_rows(load_ref(root, "trajectories")))
    assert statuses["finished"]
    assert statuses["failed"] == ROLLOUTS - statuses["finished"] > 0


def test_a_model_that_moved_is_not_asked_again_and_one_that_changed_is(
    root: str, tmp_path: Path, dying: list[list[str]]
) -> None:
    settings = _settings(root, tmp_path)
    first = collect(settings)[0].artifacts
    moved = shutil.copytree(settings.server.model, tmp_path / "moved")
    elsewhere = settings.model_copy(update={"server": settings.server.model_copy(update={"model": str(moved)})})
    (again,) = collect(elsewhere)
    assert again.cached
    assert again.artifacts == first
    (moved / "generation_config.json").write_text('{"temperature": 0.5}')
    (anew,) = collect(elsewhere)
    assert not anew.cached
    assert anew.artifacts["trajectories"].uri != first["trajectories"].uri


def test_an_adapter_that_would_not_be_served_whole_starts_no_server(tmp_path: Path, dying: list[list[str]]) -> None:
    model = tiny_model(tmp_path / "model")
    adapter = tiny_adapter(model, tmp_path, {"target_modules": ["q_proj", "lm_head"]})
    with (
        serving.model_server(config.Server(model=str(model)), config.Serve(), str(tmp_path)) as connect,
        pytest.raises(ConfigError, match="lm_head"),
    ):
        connect(adapter)
    assert not list(tmp_path.glob("server-*.log"))


def test_an_adapter_is_loaded_again(tmp_path: Path, dying: list[list[str]]) -> None:
    model = tiny_model(tmp_path / "model")
    adapter = tiny_adapter(model, tmp_path, {"target_modules": ["q_proj"]})
    server = config.Server(model=str(model))
    with serving.model_server(server, config.Serve(), str(tmp_path)) as connect:
        asked = connect(adapter)
        assert asked.model in server_api.served_models(asked.base_url[0])
        assert not connect.revive()
        os.kill(counts(asked.base_url[0])["pid"], signal.SIGKILL)
        assert connect.revive()
        assert asked.model not in server_api.served_models(asked.base_url[0])
        assert connect(adapter) == asked
        assert asked.model in server_api.served_models(asked.base_url[0])


def test_a_server_that_somebody_else_runs_loads_an_adapter_that_it_would_serve_whole(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    adapter = tiny_adapter(model, tmp_path, {"target_modules": ["q_proj"]})
    with server_process(tmp_path / "server.log", free_port()) as served:
        server = config.Server(base_url=[served.base_url], model=str(model))
        with serving.model_server(server, config.Serve(), str(tmp_path)) as connect:
            asked = connect(adapter)
            assert asked.model in server_api.served_models(served.base_url)
            assert connect(adapter) == asked
        with (
            serving.model_server(server, config.Serve(max_lora_rank=1), str(tmp_path)) as connect,
            pytest.raises(ConfigError, match="max_lora_rank"),
        ):
            connect(tiny_adapter(model, tmp_path / "other", {"target_modules": ["k_proj"]}))


def test_a_merged_model_is_there_as_long_as_it_is_served(tmp_path: Path, dying: list[list[str]]) -> None:
    model = tiny_model(tmp_path / "model")
    facts = {"base_fingerprint": model_fingerprint(model)}
    adapter = tiny_adapter(model, tmp_path, {"target_modules": ["q_proj"]}, **facts)
    server = config.Server(model=str(model))
    with serving.model_server(server, config.Serve(adapters="merged"), str(tmp_path)) as connect:
        assert connect(adapter) == connect(adapter)
        assert len(list(tmp_path.glob("work/drag-merged-*/files/model/model.safetensors"))) == 1
    assert not list(tmp_path.glob("work/drag-merged-*"))
