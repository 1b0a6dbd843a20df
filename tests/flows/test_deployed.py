"""Deployments run by worker processes that have the project installed, and no more: another folder, no secret of their own."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from flows import deploy_files
from flows.deploy import deploy
from tasks import config, limits, storage
from tasks.errors import ConfigError
from tasks.logs import log_tail
from tasks.refs import load_ref
from tests.flows.test_improve import STAGES, small_loop
from tests.model_server import ModelServer, Status
from tests.receiver import Receiver
from tests.small_collection import searcher
from tests.tiny_model import tiny_model
from tests.workers import API, ROOT, ended, listed, start_run, worker

SECRETS = {
    "OPENAI_API_KEY": "sk-secret-of-the-model-server",
    "AWS_ACCESS_KEY_ID": "AKIA-nobody-may-see",
    "AWS_SECRET_ACCESS_KEY": "wJalr-nobody-may-see",
}
DEPLOYMENT = "11111111-1111-4111-8111-111111111111"
BLOCKS = deploy_files.read_pools().blocks
VARIABLES = {spec.variable for spec in BLOCKS.values()}


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with Receiver() as made:
        yield made


@pytest.fixture(scope="module")
def deployed(s3_server: str, whole_server: str, receiver: Receiver) -> Iterator[str]:
    """Address of a server onto which the project was deployed by somebody who has the secrets."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**SECRETS, "DRAG_WEBHOOK_URL": receiver.url}.items():
            patch.setenv(name, value)
        storage._client().create_bucket(Bucket="deployed")
        deploy(config.Deploy(storage="s3://deployed/drag"))
        for name in SECRETS:
            patch.delenv(name)
        yield whole_server


@pytest.fixture(scope="module", autouse=True)
def killed_holder(deployed: str) -> None:
    """Somebody held the only slot of the limit "killed" and was killed, before any test here."""
    API.post(f"{deployed}/v2/concurrency_limits/", json={"name": "killed", "limit": 1})
    hold = "import time\nfrom tasks import limits\nlimits.LEASE_S = 60\nwith limits.slot('killed'):\n print('held', flush=True)\n"
    env = os.environ | {"PYTHONPATH": str(ROOT), "PREFECT__RUNTIME__DEPLOYMENT__ID": DEPLOYMENT}
    process = subprocess.Popen([sys.executable, "-c", hold + " time.sleep(3600)"], stdout=subprocess.PIPE, env=env)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not _takes_a_slot(deployed, "killed")


def test_ingest_runs_as_it_is_offered_and_no_secret_shows(
    deployed: str, documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "of-this-test")  # the deployed ones are for runs
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of-this-test")
    storage._client.cache_clear()
    for file in sorted((documents / "pdfs").iterdir()):
        storage.write_bytes(f"s3://deployed/drag/input/documents/{file.name}", file.read_bytes())
    storage.write_bytes("s3://deployed/drag/input/questions.jsonl", (documents / "questions.jsonl").read_bytes())
    run = start_run(deployed, "ingest/ingest")
    with worker("cpu", tmp_path / "elsewhere", without=VARIABLES) as log:
        done = ended(deployed, run, log)
    assert done["state_type"] == "COMPLETED", log.read_text()
    assert load_ref("s3://deployed/drag", "pages").rows == 20
    assert load_ref("s3://deployed/drag", "questions").rows == 10

    kinds = [
        "work_pools",
        "deployments",
        "flow_runs",
        "task_runs",
        "logs",
        "artifacts",
        "block_documents",
        "automations",
    ]
    said = {kind: json.dumps(listed(deployed, kind)) for kind in kinds}
    said["events"] = httpx.post(f"{deployed}/events/filter", json={"limit": 50}, timeout=60).text
    said["worker"] = log.read_text()
    said["storage"] = "".join(
        storage.read_bytes(file).decode(errors="replace") for file in storage.iter_files("s3://deployed/drag")
    )
    for secret in [*SECRETS.values(), "secret-webhook-path"]:
        assert [where for where, text in said.items() if secret in text] == []
    assert run in said["flow_runs"]
    assert "read documents" in said["task_runs"]


def test_a_night_that_fails_is_told(deployed: str, receiver: Receiver, tmp_path: Path) -> None:
    empty = str(tmp_path / "nothing-ingested")
    run = start_run(deployed, "collect/nightly", {"storage": empty})
    with worker("gpu-serving", tmp_path / "elsewhere", without=VARIABLES) as log:
        assert ended(deployed, run, log)["state_type"] == "FAILED"
        told = receiver.heard.get(timeout=300)
    assert "Nightly collection" in told["text"]
    assert "Failed" in told["text"]
    assert run in told["text"]


@pytest.fixture
def as_deployed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this process were a run of a deployment."""
    monkeypatch.setenv("PREFECT__RUNTIME__DEPLOYMENT__ID", DEPLOYMENT)


def _takes_a_slot(url: str, limit: str) -> bool:
    """Whether somebody else would get a slot now; they would keep it a minute at most."""
    body = {"names": [limit], "slots": 1, "lease_duration": 60}
    code = 503
    while code == 503:  # the server's database was busy just then
        code = httpx.post(f"{url}/v2/concurrency_limits/increment-with-lease", json=body, timeout=60).status_code
    assert code in (200, 423)
    return code == 200


def test_a_slot_keeps_others_out_and_a_plain_command_needs_none(
    deployed: str, monkeypatch: pytest.MonkeyPatch, as_deployed: None
) -> None:
    with limits.slot("gpu-serving"):
        assert not _takes_a_slot(deployed, "gpu-serving")
    monkeypatch.delenv("PREFECT__RUNTIME__DEPLOYMENT__ID")
    with limits.slot("gpu-serving"):
        assert _takes_a_slot(deployed, "gpu-serving")
    with limits.slot("gpu-nothing"):  # type: ignore[arg-type]
        pass


def test_a_limit_that_does_not_exist_is_an_error(deployed: str, as_deployed: None) -> None:
    with pytest.raises(ConfigError, match="drag deploy"), limits.slot("gpu-nothing"):  # type: ignore[arg-type]
        pass


def test_machines_that_train_together_need_a_slot_each(deployed: str, as_deployed: None) -> None:
    with pytest.raises(ConfigError, match="slots for 1 at once"), limits.slot("gpu-training", together=2):
        pass


def _retry(run: str) -> None:
    retry = [sys.executable, "-m", "prefect", "flow-run", "retry", run]
    subprocess.run(retry, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


def _until(reached: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + 400
    while not reached():
        assert time.monotonic() < deadline, log_tail(log)
        time.sleep(0.2)


def _kill(url: str, run: str) -> None:
    """kill -9 of the process that a flow run is."""
    pid = API.get(f"{url}/flow_runs/{run}").json()["infrastructure_pid"]
    os.kill(int(pid.rpartition(":")[2]), signal.SIGKILL)


@pytest.mark.timeout(1500)
def test_improve_runs_each_stage_once_in_its_pool_though_killed_and_failed(
    deployed: str, documents: Path, tmp_path: Path
) -> None:
    root, model = str(tmp_path / "store"), str(tiny_model(tmp_path / "model"))

    def found_collect() -> int:
        said = listed(deployed, "logs", logs={"flow_run_id": {"any_": [run]}})
        return sum("collect is the run" in line["message"] for line in said)

    with ModelServer(lambda request, call: Status(400)) as server:
        server.models, server.holding = [model], True
        settings = small_loop(root, documents, model, server.url)
        run = start_run(deployed, "improve/improve", settings.model_dump(mode="json"))
        with (
            worker("cpu", tmp_path / "one", without=VARIABLES) as log,
            worker("gpu-serving", tmp_path / "two", without=VARIABLES),
            worker("gpu-training", tmp_path / "three", without=VARIABLES),
        ):
            _until(lambda: server.in_flight > 0, log)
            _kill(deployed, run)  # while its collect runs
            assert ended(deployed, run, log)["state_type"] == "CRASHED"
            _until(
                lambda: "flow_runs.worker - Check whether" in log.read_text(), log
            )  # a retry before would be marked as well
            _retry(run)
            _until(lambda: found_collect() == 2, log)
            server.holding = False
            failed = ended(deployed, run, log)
            assert failed["state_type"] == "FAILED"
            assert "collect did not complete" in failed["state"]["message"], failed["state"]["message"]
            server.script = searcher
            _retry(run)
            done = ended(deployed, run, log)
        assert done["state_type"] == "COMPLETED", done["state"]["message"]

    ours = {task["id"] for task in listed(deployed, "task_runs", flow_runs={"id": {"any_": [run]}})}
    children = [r for r in listed(deployed, "flow_runs") if r["parent_task_run_id"] in ours]
    ran = sorted(children, key=lambda r: r["start_time"])
    pools = ["cpu", "gpu-serving", "cpu", "gpu-training", "gpu-serving"]
    assert [(r["work_pool_name"], r["state_type"]) for r in ran] == [(pool, "COMPLETED") for pool in pools]
    assert [r["run_count"] for r in ran] == [1, 2, 1, 1, 1]  # what failed is run again, and nothing else
    tables = listed(deployed, "artifacts", artifacts={"key": {"any_": ["stages"]}, "flow_run_id": {"any_": [run]}})
    rows = json.loads(tables[0]["data"])
    assert [row["stage"] for row in rows] == STAGES
    assert not any(row["cached"] for row in rows)


def test_a_killed_holder_gave_its_slot_back(deployed: str) -> None:
    """Last here: that takes a minute, in which the others run."""
    deadline = time.monotonic() + 400
    while not _takes_a_slot(deployed, "killed"):
        assert time.monotonic() < deadline, "the slot stayed taken"
        time.sleep(1)
