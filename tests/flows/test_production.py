"""Prefect as infra/compose.yaml runs it, on PostgreSQL with Redis: workers in their pools, and no task run unrecorded."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from flows.ingest import ingest
from tasks import config, storage
from tasks.artifact import load_ref, read_rows
from tests.model_server import ModelServer
from tests.servers import Prefect, worker
from tests.small_collection import TOPICS, searcher
from tests.tiny_model import tiny_model

_PATIENCE_S = 400  # never waited for unless something is lost


def _count(server: Prefect, flow_run: str, *states: str) -> int:
    """Task runs of a flow run that the server's database has in one of these states, or in any."""
    chosen: dict[str, Any] = {"flow_runs": {"id": {"any_": [flow_run]}}}
    if states:
        chosen["task_runs"] = {"state": {"type": {"any_": list(states)}}}
    return server.request("POST", "/task_runs/count", chosen)


def _run(server: Prefect, deployment: str, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A run of a deployment, started as the UI starts it, once it has ended."""
    found = server.request("GET", f"/deployments/name/{deployment}/{deployment}")
    body = {"state": {"type": "SCHEDULED"}} | ({"parameters": dict(settings)} if settings else {})
    run = server.request("POST", f"/deployments/{found['id']}/create_flow_run", body)
    deadline = time.monotonic() + _PATIENCE_S
    while run["state_type"] not in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"):
        assert time.monotonic() < deadline, f"{deployment} is still {run['state_name']}"
        time.sleep(0.5)
        run = server.request("GET", f"/flow_runs/{run['id']}")
    return run


def test_the_server_has_what_the_compose_file_gives_it(production: Prefect) -> None:
    settings = production.request("GET", "/admin/settings")["server"]
    assert settings["database"]["driver"] == "postgresql+asyncpg"
    assert settings["events"]["messaging_broker"] == settings["events"]["messaging_cache"] == "prefect_redis.messaging"
    assert settings["events"]["causal_ordering"] == "prefect_redis.ordering"
    assert settings["concurrency"]["lease_storage"] == "prefect_redis.lease_storage"
    assert settings["docket"]["url"].startswith("redis://")
    assert httpx.get(production.api_url + "/admin/settings").status_code == 401  # without the password


def test_every_stage_runs_in_its_pool(
    production: Prefect, production_root: str, documents: Path, tmp_path: Path
) -> None:
    root, agent = production_root, {"protocol": "tags", "max_iterations": 3}
    storage.upload_folder(documents / "pdfs", storage.join(root, "input/documents"))
    storage.write_bytes(storage.join(root, "input/questions.jsonl"), (documents / "questions.jsonl").read_bytes())
    command = [sys.executable, "-m", "flows.cli", "deploy", "--storage", root]
    subprocess.run(command, env=production.environment, check=True)
    with contextlib.ExitStack() as stack:
        for pool in ("cpu", "gpu-serving", "gpu-training"):
            stack.enter_context(worker(production, pool))
        asked = {"base_url": [stack.enter_context(ModelServer(searcher)).url], "model": "base"}
        training = {"epochs": 1, "batch_size": 4, "lora_r": 4, "bf16": False}
        model = str(tiny_model(tmp_path / "model"))
        runs = [
            _run(production, "ingest"),  # on what lies below the storage root, as the deployment has it
            _run(
                production, "collect", {"storage": root, "agent": agent, "server": asked, "collect": {"split": "all"}}
            ),
            _run(production, "prepare", {"storage": root, "agent": agent, "format": {"split": "all"}}),
            _run(production, "finetune", {"storage": root, "model": model, "finetune": training}),
        ]
    assert [(run["work_pool_name"], run["state_name"]) for run in runs] == [
        ("cpu", "Completed"),
        ("gpu-serving", "Completed"),
        ("cpu", "Completed"),
        ("gpu-training", "Completed"),
    ]
    assert load_ref(root, "trajectories").rows == len(TOPICS)
    assert storage.exists(load_ref(root, "adapter").uri)


def _many_questions(folder: Path, number: int) -> config.Ingest:
    """Twenty pages, and so many questions about them."""
    pages = [
        {"file": "m.pdf", "page_number": n, "total_pages": 20, "text": f"Part {n} weighs {n} kg."} for n in range(1, 21)
    ]
    questions = [
        {
            "id": f"q{n:04}",
            "question": f"What does part {n % 20 + 1} weigh, asked for the time {n}?",
            "answers": [[f"{n % 20 + 1} kg"]],
            "answer_locations": [{"document": "m.pdf", "page": n % 20 + 1}],
            "category": "weight",
        }
        for n in range(number)
    ]
    for name, rows in {"pages": pages, "questions": questions}.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return config.Ingest(documents=str(folder / "pages.jsonl"), questions=str(folder / "questions.jsonl"))


def test_a_thousand_shards_are_all_recorded(production: Prefect, tmp_path: Path) -> None:
    root, shards = str(tmp_path / "store"), 1000
    ingest(config.IngestRun(storage=root, ingest=_many_questions(tmp_path, shards)))
    with ModelServer(keep=False) as server:
        command = [sys.executable, "-m", "flows.cli", "collect", "--storage", root, "--base-url", server.url]
        command += [
            "--model",
            "base",
            "--protocol",
            "tags",
            "--split",
            "all",
            "--shard-size",
            "1",
            "--concurrency",
            "32",
        ]
        subprocess.run(command, env=production.environment, check=True)
    rows = read_rows(load_ref(root, "trajectories"))
    assert len({row["rollout_id"] for row in rows}) == len(rows) == shards
    assert {row["status"] for row in rows} == {"finished"}

    flow_runs = production.request("POST", "/flow_runs/filter", {"flows": {"name": {"any_": ["collect"]}}})
    (run,) = (r["id"] for r in flow_runs if r["parameters"]["storage"] == root)
    the_stage_itself = 1
    deadline = time.monotonic() + _PATIENCE_S
    while _count(production, run, "COMPLETED") < shards + the_stage_itself and time.monotonic() < deadline:
        time.sleep(1)
    assert _count(production, run, "COMPLETED") == _count(production, run) == shards + the_stage_itself
