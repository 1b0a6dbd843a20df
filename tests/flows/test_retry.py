"""A deployed collection in which rollouts fail, and its retry by a worker that shares nothing with the first but the storage."""

import json
import os
import subprocess
import sys
import time
import uuid
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from flows.deploy import deploy
from tasks import config, nights, storage
from tasks.artifact import read_rows
from tests.model_server import ModelServer, Reply, Status
from tests.small_collection import TOPICS, ingest_small, searcher
from tests.workers import ROOT, ended, listed, start_run, worker

FAILING = ("piston", "rotor")
KEY = "vllm-key-0123456789"
LEAKY = f'{{"error": "at http://admin:pa55word@10.0.0.1:8000/v1: key {KEY} is over its quota"}}'
_PATIENCE_S = 300  # never waited for unless something is lost


def _failing(request: dict[str, Any], call: int) -> Reply | Status:
    ill = any(topic in request["messages"][-1]["content"] for topic in FAILING)
    return Status(503, LEAKY) if ill else searcher(request, call)


def _failed_table(url: str, run: str) -> tuple[list[dict[str, Any]], str]:
    """Rows and description of the newest table of failed rollouts on the run's page."""
    chosen = {"flow_run_id": {"any_": [run]}, "key": {"any_": ["failed-rollouts"]}}
    newest = max(listed(url, "artifacts", artifacts=chosen), key=lambda made: made["created"])
    return json.loads(newest["data"]), newest["description"]


def _announced(url: str) -> list[dict[str, Any]]:
    """The events of collections with many failures, once there is one: the server stores events as it finds time."""
    body = {"filter": {"event": {"name": ["drag.collect.failed-share"]}}}
    deadline = time.monotonic() + _PATIENCE_S
    while not (found := httpx.post(f"{url}/events/filter", json=body, timeout=60).raise_for_status().json()["events"]):
        assert time.monotonic() < deadline, "no event came"
        time.sleep(0.5)
    return found


@pytest.mark.timeout(1200)
def test_retry_redoes_only_what_failed_on_another_machine(
    s3_server: str, whole_server: str, documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    bucket = f"drag-{uuid.uuid4().hex}"
    storage._client().create_bucket(Bucket=bucket)
    root = f"s3://{bucket}/drag"
    ingest_small(root, documents)
    deploy(config.Deploy(storage=root))
    late_evening = datetime(2026, 11, 23, 23, 30, tzinfo=UTC)  # in Berlin it is the 24th
    with ModelServer(_failing) as server:
        chosen = config.CollectRun(
            storage=root,
            agent=config.Agent(protocol="tags", max_iterations=3),
            server=config.Server.model_validate({"base_url": server.url, "model": "base", "max_retries": 0}),
            collect=config.Collect(
                split="all",
                samples=2,
                shard_size=4,
                dt="scheduled",
                time_zone="Europe/Berlin",
                order="new-and-hardest",
                notify_failed_share=0.1,
            ),
        )
        run = start_run(whole_server, "collect/collect", chosen.model_dump(mode="json"), late_evening)
        with worker("gpu-serving", tmp_path / "one") as log:
            failed = ended(whole_server, run, log)
        assert failed["state_type"] == "FAILED", log.read_text()
        assert failed["name"].startswith("collect-all-2026-11-24-"), "the night that it is"
        assert "4 of 20 rollouts failed (server_error 4)" in failed["state"]["message"]

        rows, description = _failed_table(whole_server, run)
        ill = [f"q{TOPICS.index(topic)}" for topic in FAILING]
        assert sorted((row["question"], row["sample"]) for row in rows) == sorted((q, n) for q in ill for n in (0, 1))
        assert {(row["sampling"], row["attempt"], row["reason"]) for row in rows} == {("default", 1, "server_error")}
        assert all("over its quota" in row["detail"] for row in rows)
        assert "4 of 20 rollouts failed" in description
        (event,) = _announced(whole_server)
        assert event["payload"] == {"share": 0.2, "failed": 4, "planned": 20, "reasons": {"server_error": 4}}
        assert event["resource"]["prefect.resource.id"] == f"prefect.flow-run.{run}"
        roles = {related["prefect.resource.role"]: related.get("prefect.resource.name") for related in event["related"]}
        assert roles["deployment"] == "collect"
        said = (
            json.dumps(listed(whole_server, "artifacts")) + json.dumps(listed(whole_server, "logs")) + log.read_text()
        )
        stored = [storage.read_bytes(file) for file in storage.iter_files(root)]
        for secret in ("pa55word", KEY):
            assert secret not in said
            assert not any(secret.encode() in content for content in stored)
        assert list(nights.partitions(root, "trajectories")) == []  # a night that failed is none yet

        server.script, calls, seen = searcher, server.calls, len(server.requests)
        retry = [sys.executable, "-m", "prefect", "flow-run", "retry", run]
        subprocess.run(retry, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
        other = tmp_path / "other-machine"
        other.mkdir()
        environment = {"HOME": str(other), "PREFECT_HOME": str(other / "prefect"), "DRAG_CACHE": str(other / "cache")}
        with worker("gpu-serving", tmp_path / "two", environment=environment) as log:
            done = ended(whole_server, run, log)
        assert done["state_type"] == "COMPLETED", log.read_text()
        assert done["run_count"] == 2
        self_test_calls, turns = 4, 3
        assert server.calls - calls == self_test_calls + turns * len(rows)
        asked = "".join(message["content"] for request in server.requests[seen:] for message in request["messages"])
        assert {topic for topic in TOPICS if f"How heavy is the {topic}?" in asked} == set(FAILING)

    assert _failed_table(whole_server, run) == ([], "None. The 4 that had failed before are finished.")
    assert [p.night for p in nights.partitions(root, "trajectories")] == [date(2026, 11, 24)]
    (night,) = nights.between(root, ["trajectories"], None, None).values()
    found = read_rows(night)
    assert {row["status"] for row in found} == {"finished"}
    assert sorted(row["question_id"] for row in found if row["attempt"] == 2) == sorted(2 * ill)
    assert len({row["rollout_id"] for row in found}) == len(found) == 20
