"""Prefect as infra/compose.yaml runs it, on PostgreSQL with Redis: workers in their pools, and no task run unrecorded."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from flows.finetune import finetuned
from flows.ingest import ingest
from tasks import config, storage
from tasks.artifact import read_rows
from tasks.logs import log_tail
from tasks.refs import load_ref
from tests.model_server import ModelServer, Reply, Status
from tests.receiver import Receiver
from tests.servers import Prefect, worker
from tests.small_collection import TOPICS, searcher
from tests.tiny_model import tiny_model
from tests.workers import FINAL, parent

FAILING = TOPICS[-2:]
_PATIENCE_S = 400  # never waited for unless something is lost


def _count(server: Prefect, flow_run: str, *states: str) -> int:
    """Task runs of a flow run that the server's database has in one of these states, or in any."""
    chosen: dict[str, Any] = {"flow_runs": {"id": {"any_": [flow_run]}}}
    if states:
        chosen["task_runs"] = {"state": {"type": {"any_": list(states)}}}
    return server.request("POST", "/task_runs/count", chosen)


def _start(server: Prefect, deployment: str, settings: Mapping[str, Any] | None = None) -> str:
    """Start a run of a deployment as the UI does; its id."""
    found = server.request("GET", f"/deployments/name/{deployment}/{deployment}")
    body = {"state": {"type": "SCHEDULED"}} | ({"parameters": dict(settings)} if settings else {})
    return server.request("POST", f"/deployments/{found['id']}/create_flow_run", body)["id"]


def _ended(server: Prefect, run: str) -> dict[str, Any]:
    """A run once it has ended."""
    deadline = time.monotonic() + _PATIENCE_S
    while (found := server.request("GET", f"/flow_runs/{run}"))["state_type"] not in FINAL:
        assert time.monotonic() < deadline, f"{found['name']} is still {found['state_name']}"
        time.sleep(0.5)
    return found


def _failing(request: dict[str, Any], call: int) -> Reply | Status:
    ill = any(topic in request["messages"][-1]["content"] for topic in FAILING)
    return Status(503) if ill else searcher(request, call)


def _until_it_waits(log: Path) -> None:
    """Until a worker's run says that it waits for the slot that somebody else holds."""
    deadline = time.monotonic() + _PATIENCE_S
    while "Waiting for a slot of the limit gpu-training" not in log.read_text():
        assert time.monotonic() < deadline, log_tail(log)
        time.sleep(0.2)


def _saved(root: str) -> int:
    """Steps of the newest whole checkpoint in the bucket; 0 where there is none."""
    found = re.findall(r"/checkpoint-(\d+)/complete\.json$", "\n".join(storage.iter_files(root)), re.MULTILINE)
    return max(map(int, found), default=0)


def _lose_its_machine(server: Prefect, run: str, root: str) -> int:
    """Once a training run has saved something, kill it and its worker, as when their machine goes; the steps it had saved."""
    deadline = time.monotonic() + _PATIENCE_S
    while not (steps := _saved(storage.join(root, "adapters"))):
        assert time.monotonic() < deadline, "no checkpoint came"
        time.sleep(0.05)
    of_run = server.request("GET", f"/flow_runs/{run}")
    assert of_run["state_type"] == "RUNNING"
    pid = int(of_run["infrastructure_pid"].rpartition(":")[2])
    for process in (parent(pid), pid):
        os.kill(process, signal.SIGKILL)
    # what the automation does ten minutes later, and the server when the slot's lease has run out
    crashed = {"state": {"type": "CRASHED"}, "force": True}
    server.request("POST", f"/flow_runs/{run}/set_state", crashed)
    server.request("PATCH", "/v2/concurrency_limits/gpu-training", {"active_slots": 0})
    return steps


def test_the_server_has_what_the_compose_file_gives_it(production: Prefect) -> None:
    settings = production.request("GET", "/admin/settings")["server"]
    assert settings["database"]["driver"] == "postgresql+asyncpg"
    assert settings["events"]["messaging_broker"] == settings["events"]["messaging_cache"] == "prefect_redis.messaging"
    assert settings["events"]["causal_ordering"] == "prefect_redis.ordering"
    assert settings["concurrency"]["lease_storage"] == "prefect_redis.lease_storage"
    assert settings["docket"]["url"].startswith("redis://")
    assert httpx.get(production.api_url + "/admin/settings").status_code == 401  # without the password


def test_the_ui_lies_where_the_images_user_may_write(production: Prefect) -> None:
    """Prefect copies it when it starts, by itself into its package, which belongs to root there; it starts without it too."""
    copied = production.request("GET", "/admin/settings")["server"]["ui"]["static_directory"]
    assert copied
    assert not Path(copied).is_relative_to(sys.prefix)
    assert list(Path(copied).rglob("index.html"))
    page = httpx.get(production.api_url.removesuffix("api"), headers={"Accept": "text/html"}, follow_redirects=True)
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")


def test_every_stage_runs_in_its_pool_though_rollouts_fail_and_a_machine_goes(
    production: Prefect, production_root: str, documents: Path, tmp_path: Path
) -> None:
    root, agent = production_root, {"protocol": "tags", "max_iterations": 3}
    storage.upload_folder(documents / "pdfs", storage.join(root, "input/documents"))
    storage.write_bytes(storage.join(root, "input/questions.jsonl"), (documents / "questions.jsonl").read_bytes())
    model = str(tiny_model(tmp_path / "model"))
    training = {"epochs": 40, "batch_size": 2, "lora_r": 4, "bf16": False, "save_steps": 10}
    with contextlib.ExitStack() as stack:
        receiver, served = stack.enter_context(Receiver()), stack.enter_context(ModelServer(_failing))
        command = [sys.executable, "-m", "flows.cli", "deploy", "--storage", root]
        subprocess.run(command, env=production.environment | {"DRAG_WEBHOOK_URL": receiver.url}, check=True)
        for pool in ("cpu", "gpu-serving"):
            stack.enter_context(worker(production, pool, tmp_path / "one"))
        first = stack.enter_context(worker(production, "gpu-training", tmp_path / "one"))
        runs = [_ended(production, _start(production, "ingest"))]  # on what lies below the storage root, as deployed

        asked = {"base_url": [served.url], "model": "base", "max_retries": 0}
        some_fail = {"split": "all", "notify_failed_share": 0.1, "allow_failed_share": 0.5}
        settings = {"storage": root, "agent": agent, "server": asked, "collect": some_fail}
        runs.append(_ended(production, _start(production, "collect", settings)))
        told = receiver.heard.get(timeout=_PATIENCE_S)["text"]
        assert f"Collection {runs[-1]['name']}: too many rollouts failed" in told
        counts = {"share": 0.2, "failed": 2, "planned": 10, "reasons": {"server_error": 2}}
        assert json.loads(told[told.index("{") :]) == counts

        settings = {"storage": root, "agent": agent, "format": {"split": "all"}}
        runs.append(_ended(production, _start(production, "prepare", settings)))

        held = {"names": ["gpu-training"], "slots": 1, "lease_duration": _PATIENCE_S}
        lease = production.request("POST", "/v2/concurrency_limits/increment-with-lease", held)
        run = _start(production, "finetune", {"storage": root, "model": model, "finetune": training})
        _until_it_waits(first)
        assert "Training:" not in first.read_text()
        production.request("POST", "/v2/concurrency_limits/decrement-with-lease", {"lease_id": lease["lease_id"]})
        saved = _lose_its_machine(production, run, root)
        again = [sys.executable, "-m", "prefect", "flow-run", "retry", run]
        subprocess.run(again, env=production.environment, check=True)
        second = stack.enter_context(worker(production, "gpu-training", tmp_path / "two"))
        runs.append(_ended(production, run))
    assert [(run["work_pool_name"], run["state_name"]) for run in runs] == [
        ("cpu", "Completed"),
        ("gpu-serving", "Completed"),
        ("cpu", "Completed"),
        ("gpu-training", "Completed"),
    ]
    assert [row["status"] for row in read_rows(load_ref(root, "trajectories"))].count("finished") == len(TOPICS) - 2
    steps = [[int(step) for step in re.findall(r"Training: (\d+) of", log.read_text())] for log in (first, second)]
    assert steps[0][0] == 1
    assert steps[1][0] > saved
    undisturbed = finetuned(
        str(tmp_path / "other"),
        config.Finetune.model_validate(training),
        config.Launch(),
        model,
        load_ref(root, "sft_best"),
        [],
        None,
    )
    assert load_ref(root, "adapter").sha256 == undisturbed.artifacts["adapter"].sha256
    assert not _saved(root)


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
    return config.Ingest(ocr_file=str(folder / "pages.jsonl"), questions=str(folder / "questions.jsonl"))


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
