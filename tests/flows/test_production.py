"""Prefect as infra/compose.yaml runs it, on PostgreSQL with Redis: workers in their pools, and no task run unrecorded."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from flows.ingest import ingest
from tasks import config
from tasks.artifact import load_ref, read_rows
from tests.model_server import ModelServer
from tests.servers import Prefect

_PATIENCE_S = 400  # never waited for unless something is lost


def _count(server: Prefect, flow_run: str, *states: str) -> int:
    """Task runs of a flow run that the server's database has in one of these states, or in any."""
    chosen: dict[str, Any] = {"flow_runs": {"id": {"any_": [flow_run]}}}
    if states:
        chosen["task_runs"] = {"state": {"type": {"any_": list(states)}}}
    return server.request("POST", "/task_runs/count", chosen)


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
