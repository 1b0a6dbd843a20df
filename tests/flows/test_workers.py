"""Deployments as worker processes run them: in which order, which not twice, and what becomes of runs whose machine goes."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.states import Pending, Running

from flows import deploy_files, deploy_server
from flows.deploy import deploy
from tasks import artifact, config, limits, refs, storage
from tasks import collect as shards
from tasks.artifact import read_rows
from tasks.logs import log_tail
from tasks.model import model_fingerprint
from tasks.refs import load_ref
from tasks.training import launch
from tests.model_server import ModelServer
from tests.small_collection import ingest_small, searcher
from tests.tiny_model import tiny_adapter, tiny_model
from tests.workers import API, ROOT, ended, parent, start_run, worker

LOST_AFTER_S = 30


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def root(whole_server: str, documents: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A storage root with pages and questions, for which the project is deployed to `whole_server`."""
    made = str(tmp_path_factory.mktemp("workers") / "store")
    ingest_small(made, documents)
    deploy(config.Deploy(storage=made))
    API.patch(f"{whole_server}/work_pools/gpu-serving", json={"concurrency_limit": 9})  # some of them will hang here
    return made


def _until(reached: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + 200
    while not reached():
        assert time.monotonic() < deadline, log_tail(log)
        time.sleep(0.2)


def _pid(url: str, run: str) -> int:
    """The process that a flow run is."""
    return int(API.get(f"{url}/flow_runs/{run}").json()["infrastructure_pid"].rpartition(":")[2])


@pytest.fixture(scope="module", autouse=True)
def lost(whole_server: str, root: str, model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run that serves a model, killed together with its worker, as when their machine goes."""
    folder = tmp_path_factory.mktemp("lost")
    vllm = folder / "python"  # in the place of the interpreter that has vLLM
    server = f'[sys.executable, "{ROOT}/tests/model_server.py", *sys.argv[sys.argv.index("--port"):][:2]]'
    vllm.write_text(f"#!{sys.executable}\nimport os, sys\nos.execv(sys.executable, {server})\n")
    vllm.chmod(0o755)

    run = start_run(whole_server, "serve/serve", {"storage": root, "model": str(model)})
    spec = next(spec for spec in deploy_files.read_automations() if spec.crashed)
    trigger = {"match": {"prefect.resource.id": f"prefect.flow-run.{run}"}, "within": timedelta(seconds=LOST_AFTER_S)}
    quick = spec.model_copy(update={"name": "quick", "trigger": type(spec.trigger)(**dict(spec.trigger) | trigger)})
    with get_client(sync_client=True) as client:
        assert deploy_server.automation(client, quick, {}).outcome == "created"
    with worker("gpu-serving", folder / "worker", environment={"DRAG_VLLM_PYTHON": str(vllm)}) as log:
        _until(lambda: "serving base at" in log.read_text(), log)
        pid = _pid(whole_server, run)
        os.kill(parent(pid), signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)
    return run


def test_who_waits_goes_first_and_no_night_starts_while_another_runs(
    whole_server: str, root: str, tmp_path: Path
) -> None:
    nothing = {"storage": str(tmp_path / "nothing-ingested")}
    with get_client(sync_client=True) as client, ModelServer(searcher) as server:
        night = client.read_flow_run(start_run(whole_server, "collect/nightly"))
        for state in (Pending(), Running()):  # as a worker elsewhere reports it
            client.set_flow_run_state(night.id, state)
        second = start_run(whole_server, "collect/nightly")
        late = start_run(whole_server, "collect/collect", nothing, queue="nightly")
        settings = config.EvaluateRun(
            storage=root,
            agent=config.Agent(protocol="tags", max_iterations=3),
            server=config.Server(base_url=server.url, model="base", max_retries=0),
            evaluate=config.Evaluate(resamples=100),
            variants=[config.Variant(name="question", model="question"), config.Variant(name="base", model="base")],
        )
        first = start_run(whole_server, "evaluate/evaluate", settings.model_dump(mode="json"))
        with worker("gpu-serving", tmp_path / "worker", limit=1) as log:
            measured, waited = (ended(whole_server, run, log) for run in (first, late))
            cancelled = ended(whole_server, second, log)
        assert measured["state_type"] == "COMPLETED", log.read_text()
        assert measured["start_time"] < measured["end_time"] < waited["start_time"]  # though it came last
        assert (cancelled["state_type"], cancelled["run_count"]) == ("CANCELLED", 0)
        assert client.read_flow_run(night.id).state_type.value == "RUNNING"
    assert {row["run"] for row in read_rows(load_ref(root, "results-base"))} == {"base"}
    assert storage.exists(load_ref(root, "report").uri)


def test_merge_runs_in_its_pool(whole_server: str, root: str, model: Path, tmp_path: Path) -> None:
    adapter = tiny_adapter(model, tmp_path, {"target_modules": ["q_proj"]}, base_fingerprint=model_fingerprint(model))
    refs.save_ref(root, "adapter", adapter)
    run = start_run(whole_server, "merge/merge", {"storage": root, "model": str(model)})
    with worker("gpu-training", tmp_path / "worker") as log:
        assert ended(whole_server, run, log)["state_type"] == "COMPLETED", log.read_text()
    assert load_ref(root, "merged_model").schema == "model/1"


def _held_after_five(url: str, root: str, server: ModelServer, seed: int) -> str:
    """A collection that hangs once five rollouts are done; its run."""

    def holding(request: dict[str, Any], call: int) -> Any:
        server.holding = call > 20  # after the test questions and five rollouts
        return searcher(request, call)

    server.script = holding
    settings = config.CollectRun(
        storage=root,
        agent=config.Agent(protocol="tags", max_iterations=3),
        server=config.Server(base_url=server.url, model="base", max_retries=0, concurrency=1),
        collect=config.Collect(split="all", flush_every=1000, seed=seed),
    )
    return start_run(url, "collect/collect", settings.model_dump(mode="json"))


def test_a_pod_that_is_stopped_writes_what_it_has_and_its_run_goes_on_elsewhere(
    whole_server: str, root: str, tmp_path: Path
) -> None:
    """As infra/kubernetes has it: `prefect flow-run execute`, told by SIGTERM, gives the run back to the pool."""
    log = tmp_path / "pod.log"
    pod = dict(os.environ) | {"PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR": "reschedule", "PYTHONPATH": str(ROOT)}
    with ModelServer(searcher) as server:
        run = _held_after_five(whole_server, root, server, seed=7)
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "prefect", "flow-run", "execute", run], env=pod, stdout=output, stderr=output
            )
        _until(lambda: server.holding, log)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0, log_tail(log)
        waiting = API.get(f"{whole_server}/flow_runs/{run}").json()
        assert (waiting["state_type"], waiting["state_name"]) == ("SCHEDULED", "AwaitingRetry"), log_tail(log)
        (watching,) = (spec for spec in deploy_files.read_automations() if spec.crashed)
        assert (
            f"prefect.flow-run.{waiting['state_name']}" in watching.trigger.expect
        )  # it is not taken for dead meanwhile

        before, server.script, server.holding = server.calls, searcher, False
        with worker("gpu-serving", tmp_path / "worker") as log:
            assert ended(whole_server, run, log)["state_type"] == "COMPLETED", log_tail(log)
        assert server.calls - before == 4 + 3 * 5  # the test questions, and what was not done


def test_a_worker_that_is_stopped_lets_its_run_write_what_it_has(whole_server: str, root: str, tmp_path: Path) -> None:
    rollouts = storage.join(root, "rollouts")
    before = set(storage.iter_files(rollouts))
    with ModelServer(searcher) as server:
        run = _held_after_five(whole_server, root, server, seed=0)
        with worker("gpu-serving", tmp_path / "worker") as log:
            _until(lambda: server.holding, log)
            of_worker = parent(parent(_pid(whole_server, run)))
            os.kill(of_worker, signal.SIGTERM)
            done = ended(whole_server, run, log)
    assert done["state_type"] == "CRASHED"
    (part,) = set(storage.iter_files(rollouts)) - before
    assert artifact.read_parts(part, shards.SCHEMA, ["status"])["status"].to_pylist() == ["finished"] * 5


def test_work_ends_that_has_lost_its_slot(whole_server: str, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT__RUNTIME__DEPLOYMENT__ID", "11111111-1111-4111-8111-111111111111")
    monkeypatch.setattr("prefect.concurrency._leases._RENEWAL_FRACTION", 0.001)
    training = "import time\nwhile True:\n print('a step', flush=True)\n time.sleep(0.1)"
    said: list[str] = []

    def lose_it(line: str) -> None:
        said.append(line)
        if len(said) == 3:
            (lease,) = (t.name for t in threading.enumerate() if t.name.startswith("concurrency-lease-renewal-"))
            body = {"lease_id": lease.removeprefix("concurrency-lease-renewal-")}
            API.post(f"{whole_server}/v2/concurrency_limits/decrement-with-lease", json=body)

    with pytest.raises(asyncio.CancelledError), limits.slot("gpu-training"):
        launch.run([sys.executable, "-c", training], lambda step, total, loss: None, lose_it)
    assert len(said) > 3


def test_a_run_whose_machine_is_gone_ends_as_crashed(whole_server: str, lost: str, tmp_path: Path) -> None:
    done = ended(whole_server, lost, tmp_path / "no-log")
    assert done["state_type"] == "CRASHED"
    (spec,) = (spec for spec in deploy_files.read_automations() if spec.crashed)
    assert done["state"]["message"] == spec.crashed
