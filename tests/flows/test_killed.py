"""kill -9 in the middle of `drag collect`, then the same command: the same result, nothing lost, nothing done twice."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tasks import artifact
from tasks.artifact import load_ref, read_rows
from tests.model_server import ModelServer
from tests.small_collection import ingest_small, searcher


def test_drag_collect_killed_and_run_again(tmp_path: Path, documents: Path) -> None:
    root = str(tmp_path / "store")
    ingest_small(root, documents)
    with ModelServer(searcher, delay_s=0.4) as server:
        command = [sys.executable, "-m", "flows.cli", "collect", "--storage", root, "--base-url", server.url]
        command += ["--model", "base", "--protocol", "tags", "--max-iterations", "3", "--split", "all"]
        command += ["--samples", "3", "--concurrency", "2", "--shard-size", "4", "--flush-every", "2"]
        env = dict(os.environ) | {"DRAG_HOME": str(tmp_path / "home")}
        env.pop("PREFECT_API_URL", None)
        first = subprocess.Popen(command, env=env)
        rollouts = Path(root) / "rollouts"
        deadline = time.monotonic() + 120
        while len(list(rollouts.rglob("*.parquet"))) < 3:
            assert time.monotonic() < deadline, "nothing was collected"
            assert first.poll() is None, "it ended before it was killed"
            time.sleep(0.05)
        first.send_signal(signal.SIGKILL)
        first.wait()
        run = next(rollouts.iterdir())
        kept = artifact.read_parts(str(run), "trajectories/1", ["rollout_id", "status"])["rollout_id"].to_pylist()
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
