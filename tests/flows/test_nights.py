"""Nights gathered by the collect flow, and taken by process as a range of dates."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from flows.collect import collect
from flows.prepare import prepare, process
from tasks import artifact, cache, config, nights, storage
from tasks.artifact import read_provenance, read_rows
from tasks.cache import code_version
from tasks.errors import ArtifactError, EmptyError
from tasks.refs import has_ref, load_ref
from tasks.stages import StageRun
from tests.model_server import ModelServer
from tests.small_collection import ingest_small, searcher

AGENT = config.Agent(protocol="tags", max_iterations=3)


def _collect(root: str, url: str, dt: str | None, **chosen: Any) -> StageRun:
    settings = {"split": "all", "shard_size": 4, "dt": dt, "order": "new-and-hardest"} | chosen
    server = config.Server(base_url=url, model="base", max_retries=0, concurrency=4)
    return collect(config.CollectRun(storage=root, agent=AGENT, server=server, collect=config.Collect(**settings)))[0]


def _rows(run: StageRun) -> list[dict[str, Any]]:
    return read_rows(run.artifacts["trajectories"])


def _asked(run: StageRun) -> list[str]:
    return [row["question_id"] for row in _rows(run)]


def test_nights_gather_new_samples_and_process_takes_a_range(storage_root: str, documents: Path) -> None:
    root = storage_root
    ingest_small(root, documents)
    with ModelServer(searcher) as server:
        asked, rollouts = [], set()
        for night in ("2026-11-22", "2026-11-23", "2026-11-24"):
            run = _collect(root, server.url, night, limit=5)
            assert not run.cached
            asked.append(_asked(run))
            rollouts |= {row["rollout_id"] for row in _rows(run)}
        assert len(rollouts) == 15
        assert not set(asked[0]) & set(asked[1])  # new ones first, and then there are none left
        assert asked[2] == asked[0]  # all scored alike, so the order is that of the first night

        calls = server.calls
        assert _collect(root, server.url, "2026-11-23", limit=5).cached
        assert server.calls == calls
        # a larger limit extends its night by what is left, though other nights have asked that meanwhile
        assert _asked(_collect(root, server.url, "2026-11-23", limit=7)) == asked[1] + asked[0][:2]
        assert not has_ref(root, "trajectories")  # a night comes between no other run's stages
        self_test_calls, turns = 4, 3
        assert server.calls == calls + self_test_calls + 2 * turns

    stored = Counter(p.night.isoformat() for p in nights.partitions(root, "trajectories"))
    assert stored == {"2026-11-22": 1, "2026-11-23": 2, "2026-11-24": 1}
    for first, last, number in [("2026-11-22", "2026-11-22", 5), ("2026-11-22", "2026-11-23", 12)]:
        process(config.ProcessRun(storage=root, nights=config.Nights.model_validate({"since": first, "until": last})))
        assert load_ref(root, "processed").rows == number
    with pytest.raises(ArtifactError, match="since and until"):
        process(config.ProcessRun(storage=root))
    until = config.Nights.model_validate({"until": "2026-11-24"})
    prepare(config.PrepareRun(storage=root, agent=AGENT, format=config.Format(split="all"), nights=until))
    assert load_ref(root, "processed").rows == 17
    assert [name.split("/")[1] for name in read_provenance(load_ref(root, "processed"))["inputs"]] == [
        "dt=2026-11-22",
        "dt=2026-11-23",
        "dt=2026-11-23",
        "dt=2026-11-24",
    ]
    with pytest.raises(EmptyError, match="no night from 2026-11-25"):
        process(config.ProcessRun(storage=root, nights=config.Nights.model_validate({"since": "2026-11-25"})))


def test_a_night_is_scored_anew_where_it_lies_and_nothing_is_asked_again(
    tmp_path: Path, documents: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = str(tmp_path / "store")
    ingest_small(root, documents)
    with ModelServer(searcher) as server:
        run = _collect(root, server.url, "2026-11-23", limit=3)
    (night,) = nights.partitions(root, "scores")
    scored = load_ref(root, "scores", night.uri)
    assert {row["reciprocal_rank"] for row in read_rows(scored)} == {1.0}

    monkeypatch.setattr(nights, "reciprocal_rank", lambda rank: 0.25)
    monkeypatch.setattr(cache, "code_version", lambda module: code_version(module) + "+" * (module == "tasks.nights"))
    again = _collect(root, server.url, "2026-11-23", limit=3)  # nobody listens there any more
    assert again.cached
    assert list(nights.partitions(root, "trajectories")) == list(nights.partitions(root, "scores")) == [night]
    assert {row["reciprocal_rank"] for row in read_rows(load_ref(root, "scores", night.uri))} == {0.25}
    assert load_ref(root, "trajectories", night.uri) == run.artifacts["trajectories"]
    assert artifact.exists(scored)  # what earlier orders were made of


def test_trajectories_of_a_night_name_the_order_that_chose_them(tmp_path: Path, documents: Path) -> None:
    root = str(tmp_path / "store")
    ingest_small(root, documents)
    with ModelServer(searcher) as server:
        run = _collect(root, server.url, "2026-11-24", limit=3)
        made = read_provenance(run.artifacts["trajectories"])
    assert made["settings"]["collect"]["dt"] == "2026-11-24"
    (order,) = Path(storage.join(root, "rollouts")).rglob("order.json")
    assert made["inputs"]["order"] == load_ref(root, "order", str(order.parent.parent)).sha256


def test_without_a_schedule_the_night_is_today(tmp_path: Path, documents: Path) -> None:
    root = str(tmp_path / "store")
    ingest_small(root, documents)
    with ModelServer(searcher) as server:
        # the zone with the earliest day and that with the latest are never on the same one
        for zone in ("Pacific/Kiritimati", "Pacific/Pago_Pago"):
            _collect(root, server.url, "scheduled", limit=1, order="hash", time_zone=zone)
    found = [p.night for p in nights.partitions(root, "trajectories")]
    assert len(found) == len(set(found)) == 2
