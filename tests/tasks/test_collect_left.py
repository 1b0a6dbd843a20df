"""What a run finds of earlier ones: which shards are left to do, and which vLLM made what is folded."""

from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks import artifact, collect, storage
from tasks.collect import RolloutSpec, Shard
from tasks.errors import ArtifactError
from tasks.unwritten import Unwritten
from tests.flaky_s3 import flaky_s3
from tests.tasks.test_collect import _finish, _row, _shard

State = str  # of a shard: "finished", "failed" (one rollout is) or "missing"


def _store(shard: Shard, uri: str, state: State = "finished") -> None:
    """A shard's part, as an earlier run may have left it."""
    rows = [_row(spec, 1) for spec in shard.rollouts]
    if state == "failed":
        rows[-1] = _row(shard.rollouts[-1], 1, "failed", "connection")
    if state != "missing":
        name = f"{uri}/shard-{shard.number:05d}/part-001-0000-abc.parquet"
        artifact.write_table(artifact.table_of(rows, collect.SCHEMA), name, collect.SCHEMA, {})


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(["finished"] * 9 + ["failed", "missing"]), max_size=40))
def test_what_is_left_begins_with_the_first_shard_that_is_not_finished(
    tmp_path_factory: pytest.TempPathFactory, states: list[State]
) -> None:
    uri = str(tmp_path_factory.mktemp("left"))
    shards = [_shard(2, number) for number in range(len(states))]
    for shard, state in zip(shards, states, strict=True):
        _store(shard, uri, state)
    finished = next((n for n, state in enumerate(states) if state != "finished"), len(states))
    assert collect.unfinished(shards, uri) == shards[finished:]


def test_more_rollouts_of_a_finished_shard_are_left_and_fewer_are_not(tmp_path: Any) -> None:
    _store(_shard(5), str(tmp_path))
    assert collect.unfinished([_shard(5)], str(tmp_path)) == []
    assert collect.unfinished([_shard(3)], str(tmp_path)) == []
    assert collect.unfinished([_shard(6)], str(tmp_path)) == [_shard(6)]


def test_what_storage_does_not_give_just_now_may_be_left_to_do(
    s3_root: str, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run of the shard, which is tried again, will see."""
    shards = [_shard(2, number) for number in range(3)]
    for shard in shards:
        _store(shard, s3_root)
    # half a minute of backing off
    monkeypatch.setattr("botocore.endpoint.time", SimpleNamespace(sleep=lambda seconds: None))
    with flaky_s3(s3_server) as s3:
        monkeypatch.setenv("AWS_ENDPOINT_URL", s3.url)
        storage._client.cache_clear()
        try:
            assert collect.unfinished(shards, s3_root) == []
            s3.failing = "shard-00001/"
            assert collect.unfinished(shards, s3_root) == shards[1:]
        finally:
            storage._client.cache_clear()


def test_what_is_damaged_is_told_before_a_server_is_started(tmp_path: Any) -> None:
    _store(_shard(), str(tmp_path))
    next(tmp_path.rglob("*.parquet")).write_bytes(b"PAR1")
    with pytest.raises(ArtifactError, match="damaged"):
        collect.unfinished([_shard()], str(tmp_path))


# --- which vLLM


async def _run(shard: Shard, uri: str, vllm: Sequence[str], fails: Sequence[int] = ()) -> None:
    async def attempt(spec: RolloutSpec, number: int) -> dict[str, object]:
        return _row(spec, number, "failed", "connection") if spec.seed in fails else await _finish(spec, number)

    await collect.run_shard(shard, uri=uri, unwritten=Unwritten(100), attempt=attempt, vllm=vllm)


def _made_by(shards: Sequence[Shard], uri: str) -> list[str]:
    folded = collect.fold(shards, uri, storage.join(uri, "out", "x.parquet"), artifact.provenance(model="m"))
    made = artifact.read_provenance(folded)
    assert made["model"] == "m"
    return made["vllm"]


async def test_rollouts_name_every_vllm_that_made_them(storage_root: str) -> None:
    shards = [_shard(4, number) for number in range(3)]
    await _run(shards[0], storage_root, ["0.11.0"])
    await _run(shards[1], storage_root, ["0.10.2"], fails=[1])
    await _run(shards[1], storage_root, ["0.11.0", "0.12.0"])  # of two servers, nobody knows which made what
    _store(shards[2], storage_root)  # its part does not tell
    assert _made_by(shards, storage_root) == ["0.10.2", "0.11.0", "0.12.0"]
    assert _made_by(shards[:1], storage_root) == ["0.11.0"]
    assert _made_by(shards[2:], storage_root) == []


async def test_a_vllm_under_which_rollouts_only_failed_has_made_none(tmp_path: Any) -> None:
    await _run(_shard(4), str(tmp_path), ["0.10.2"], fails=[0, 1, 2, 3])
    await _run(_shard(4), str(tmp_path), ["0.11.0"])
    assert _made_by([_shard(4)], str(tmp_path)) == ["0.11.0"]


async def test_what_is_not_forgotten_still_names_its_vllm(tmp_path: Any) -> None:
    await _run(_shard(8), str(tmp_path), ["0.10.2"])
    collect.forget([_shard(3)], str(tmp_path))
    await _run(_shard(8), str(tmp_path), ["0.11.0"])
    assert _made_by([_shard(8)], str(tmp_path)) == ["0.10.2", "0.11.0"]
    kept = collect.attempts_that_count(_shard(8), str(tmp_path))
    assert Counter(kept["status"].to_pylist()) == {"finished": 8}
