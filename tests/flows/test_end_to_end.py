"""The whole loop with nothing scripted: real PDFs, a real vLLM, a real language model, real training."""

import contextlib
import math
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from flows.cli import RECIPES
from flows.collect import collect
from flows.improve import improve
from tasks import config, serve, server_api, storage
from tasks.agent.prompts import prompt_messages
from tasks.artifact import read_provenance, read_rows
from tasks.errors import ServerError
from tasks.model import DEMO_MODEL, fetch_model
from tasks.network import free_port
from tasks.refs import load_ref
from tasks.sample import write_sample
from tests.listening import listening
from tests.small_collection import ingest_small

# patience for a machine that runs other tests meanwhile
KEY = {"Authorization": "Bearer sk-of-nobody"}
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1200)]


@pytest.fixture
def settings(tmp_path: Path) -> config.Improve:
    """The demo, on few questions; its adapter loaded beside the base, to see that too."""
    sample = write_sample(tmp_path / "sample")
    recipe = yaml.safe_load(RECIPES["demo"].read_text())
    recipe["storage"] = str(tmp_path / "store")
    recipe["ingest"] = {"documents": str(sample.documents), "questions": str(sample.questions)}
    recipe["serve"]["adapters"] = "lora"
    recipe["collect"] |= {"limit": 32, "samples": 3}  # fewer may leave two steps, of which the first learns nothing yet
    recipe["finetune"] |= {"epochs": 2}
    recipe["evaluate"] |= {"limit": 12, "resamples": 500}
    return config.Improve.model_validate(recipe)


def test_improve_learns_measures_and_does_nothing_twice(settings: config.Improve) -> None:
    root = storage.resolve(settings.storage)
    runs = improve(settings)
    stages = [run.stage for run in runs]
    assert stages.count("collect") == 3
    trajectories = read_rows(load_ref(root, "trajectories"))
    assert len(trajectories) == 96
    assert {row["status"] for row in trajectories} == {"finished"}
    (version,) = read_provenance(load_ref(root, "trajectories"))["vllm"]
    assert version[0].isdigit()
    asked = [search["query"] for row in trajectories for turn in row["turns"] for search in turn["searches"]]
    assert len(asked) > 48
    assert len(set(asked)) > 16
    learned = read_rows(load_ref(root, "sft_best"))
    assert learned
    assert all(row["gt_rank"] in (1, 2) for row in learned)
    sft, dpo = (
        [row["loss"] for row in read_rows(run.artifacts["loss_curve"]) if row["loss"] is not None]
        for run in runs
        if run.stage == "finetune"
    )
    assert sft[-1] < sft[0]
    # too few steps for it to fall, but it begins where the model and its reference are the same
    assert dpo[0] == pytest.approx(math.log(2))
    for run in ("question", "base", "adapter"):
        assert load_ref(root, f"results-{run}").rows == 12
    assert {(row["run"], row["baseline"]) for row in read_rows(load_ref(root, "comparison"))} == {
        ("base", "question"),
        ("adapter", "question"),
        ("adapter", "base"),
    }
    assert storage.read_bytes(storage.join(load_ref(root, "report").uri, "index.html")).startswith(b"<!")

    again = improve(settings)
    assert [run.stage for run in again] == stages
    assert all(run.cached for run in again)


def _engine() -> int:
    """The process id of vLLM's engine, which is a child of the API server that we started."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended meanwhile
            name, _, rest = stat.read_text().partition(" (")[2].rpartition(") ")
            parents[int(stat.parent.name)] = int(rest.split()[1]), name
    (engine,) = [pid for pid, (_, name) in parents.items() if name.startswith("VLLM::Engine") and _ours(pid, parents)]
    return engine


def _ours(pid: int, parents: dict[int, tuple[int, str]]) -> bool:
    while pid in parents and pid != os.getpid():
        pid = parents[pid][0]
    return pid == os.getpid()


def test_an_engine_that_is_killed_costs_no_rollout(tmp_path: Path, documents: Path) -> None:
    root = str(tmp_path / "store")
    ingest_small(root, documents)
    port = free_port()
    killed: list[int] = []

    def kill_when_busy() -> None:
        while not killed:
            with contextlib.suppress(httpx.HTTPError):
                metrics = httpx.get(f"http://127.0.0.1:{port}/metrics").text
                running = re.search(r"^vllm:num_requests_running\S* (\S+)", metrics, re.MULTILINE)
                if running and float(running[1]) >= 16:
                    killed.append(_engine())
                    os.kill(killed[0], signal.SIGKILL)
            time.sleep(0.1)

    killer = threading.Thread(target=kill_when_busy, daemon=True)
    killer.start()
    collect(
        config.CollectRun(
            storage=root,
            agent=config.Agent(protocol="tags", examples=True, max_iterations=1, answer=False),
            sampling=config.Sampling(max_tokens=48),
            server=config.Server(concurrency=40),
            serve=config.Serve(max_model_len=2048, port=port),
            collect=config.Collect(split="all", samples=4),
        )
    )
    killer.join(60)
    assert killed
    trajectories = read_rows(load_ref(root, "trajectories"))
    assert len(trajectories) == 40
    assert {row["status"] for row in trajectories} == {"finished"}
    assert max(row["attempt"] for row in trajectories) == 2


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[serve.Served]:
    """A server that demands a key, which the environment holds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", "sk-of-nobody")
        with serve.serving(
            DEMO_MODEL, config.Serve(max_model_len=1024), tmp_path_factory.mktemp("vllm"), free_port()
        ) as served:
            yield served


def test_without_its_key_the_server_says_whether_it_lives_and_nothing_else(vllm: serve.Served) -> None:
    root = vllm.base_url.removesuffix("/v1")
    asked = {"model": serve.BASE_NAME, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    for path in ("/invocations", "/v1/chat/completions"):
        assert httpx.post(root + path, json=asked, timeout=60).status_code == 401
        assert httpx.post(root + path, json=asked, headers=KEY, timeout=60).status_code == 200
    for method, path in (
        ("POST", "/adapters"),
        ("DELETE", "/adapters/base"),
        ("GET", "/metrics"),
        ("POST", "/tokenize"),
    ):
        assert httpx.request(method, root + path, timeout=60).status_code == 401
    assert httpx.get(root + "/health", timeout=60).status_code == 200


def test_no_other_machine_reaches_what_vllm_opens(vllm: serve.Served) -> None:
    found = listening()
    assert int(vllm.base_url.removesuffix("/v1").rsplit(":", 1)[-1]) in found
    assert set(found.values()) == {"127.0.0.1"}


def test_the_prompt_that_is_trained_on_is_the_one_that_is_served(vllm: serve.Served) -> None:
    from transformers import AutoTokenizer

    messages = prompt_messages("How loud is it?", config.Agent(protocol="tags"))
    root = vllm.base_url.removesuffix("/v1")
    served = httpx.post(
        f"{root}/tokenize", json={"model": serve.BASE_NAME, "messages": messages}, headers=KEY, timeout=60
    ).json()
    tokenizer = AutoTokenizer.from_pretrained(fetch_model(DEMO_MODEL))
    trained = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert served["tokens"] == trained


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(ServerError, match="max_model_len"),
        serve.serving(DEMO_MODEL, config.Serve(max_model_len=10_000_000), tmp_path, free_port()),
    ):
        pass


def test_a_stopped_server_leaves_nothing_behind(tmp_path: Path, vllm: serve.Served) -> None:
    *named, own = server_api.served_models(vllm.base_url)
    assert named == [serve.BASE_NAME, DEMO_MODEL]
    assert own.startswith("started-")
    serve.watchdog.stop(vllm.process)
    with pytest.raises(ServerError, match="no model server answers"):
        server_api.served_models(vllm.base_url)
