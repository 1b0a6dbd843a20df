"""kill -9 in the middle of a command, then the same command: the same result, nothing lost, nothing done twice."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from flows.collect import collect
from flows.finetune import finetuned
from flows.prepare import prepare
from tasks import artifact, config
from tasks.artifact import read_rows
from tasks.refs import load_ref
from tests.model_server import ModelServer
from tests.small_collection import ingest_small, searcher
from tests.tiny_model import tiny_model


def _environment(tmp_path: Path) -> dict[str, str]:
    env = dict(os.environ) | {"DRAG_HOME": str(tmp_path / "home")}
    env.pop("PREFECT_API_URL", None)
    return env


def _kill_when(command: Sequence[str], env: Mapping[str, str], reached: Callable[[], bool]) -> None:
    process = subprocess.Popen(command, env=env)
    deadline = time.monotonic() + 240
    while not reached():
        assert time.monotonic() < deadline, "it never came so far"
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_drag_collect_killed_and_run_again(tmp_path: Path, documents: Path) -> None:
    root = str(tmp_path / "store")
    ingest_small(root, documents)
    with ModelServer(searcher, delay_s=0.4) as server:
        command = [sys.executable, "-m", "flows.cli", "collect", "--storage", root, "--base-url", server.url]
        command += ["--model", "base", "--protocol", "tags", "--max-iterations", "3", "--split", "all"]
        command += ["--samples", "3", "--concurrency", "2", "--shard-size", "4", "--flush-every", "2"]
        env, rollouts = _environment(tmp_path), Path(root) / "rollouts"
        _kill_when(command, env, lambda: len(list(rollouts.rglob("*.parquet"))) >= 3)
        run = next(rollouts.iterdir())
        kept = artifact.read_parts(str(run), "trajectories/2", ["rollout_id", "status"])["rollout_id"].to_pylist()
        assert 6 <= len(kept) < 30
        server.delay_s = 0.0
        before = server.calls
        assert subprocess.run(command, env=env, check=False).returncode == 0
        self_test_calls, turns = 4, 3
        assert server.calls - before == self_test_calls + turns * (30 - len(kept))
    rows = read_rows(load_ref(root, "trajectories"))
    assert len({row["rollout_id"] for row in rows}) == len(rows) == 30
    assert {row["attempt"] for row in rows} == {1}
    assert set(kept) <= {row["rollout_id"] for row in rows}


def test_drag_finetune_killed_and_run_again(tmp_path: Path, documents: Path) -> None:
    root = str(tmp_path / "store")
    agent = config.Agent(protocol="tags", max_iterations=3)
    ingest_small(root, documents)
    with ModelServer(searcher) as server:
        asked = config.Server(base_url=server.url, model="base")
        every = config.Collect(split="all")
        collect(config.CollectRun(storage=root, agent=agent, server=asked, collect=every))
    prepare(config.PrepareRun(storage=root, agent=agent, format=config.Format(split="all")))
    model = str(tiny_model(tmp_path / "model"))
    training_set = load_ref(root, "sft_best")

    command = [sys.executable, "-m", "flows.cli", "finetune", "sft", "--storage", root, "--model", model]
    command += ["--epochs", "60", "--batch-size", "2", "--lora-r", "4", "--save-steps", "10"]
    env, work = _environment(tmp_path), Path(root) / "work" / "training"
    _kill_when(command, env, lambda: any(work.glob("*/checkpoints/checkpoint-[3-9]0/complete.json")))
    again = subprocess.run(command, env=env, check=False, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    first_step = re.search(r"Training: (\d+) of", again.stderr)
    assert first_step is not None
    assert int(first_step[1]) > 30

    settings = config.Finetune(epochs=60, batch_size=2, lora_r=4, save_steps=10)
    whole = finetuned(str(tmp_path / "other"), settings, config.Launch(), model, training_set, [], None)
    adapter = load_ref(root, "adapter")
    assert adapter.sha256 == whole.artifacts["adapter"].sha256
    steps = [row["step"] for row in read_rows(load_ref(root, "loss_curve"))]
    assert steps == list(range(1, len(steps) + 1))
