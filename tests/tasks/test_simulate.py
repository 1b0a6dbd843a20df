"""The simulated collection: laws that every run obeys, queues whose answer is known, and the real collection beside it."""

import asyncio
import math
from collections.abc import Collection
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks import artifact, collect, config, simulate, storage
from tasks.artifact import Artifact
from tasks.collect_events import Flow, failing_calls
from tasks.errors import ConfigError
from tasks.schemas import TABLES
from tasks.search.index import build_index
from tasks.unwritten import Unwritten
from tests.model_server import ModelServer, Reply, Status, dutiful_agent

FREE = {"client_s": 0.0, "put_s": 0.0, "task_s": 0.0}  # what then takes time is the model server alone

flows = st.builds(
    Flow,
    rollouts=st.integers(1, 300),
    turns=st.integers(1, 4),
    service_s=st.floats(0.1, 10),
    servers=st.integers(1, 3),
    sequences=st.integers(1, 8),
    concurrency=st.integers(1, 30),
    workers=st.integers(1, 4),
    samples=st.integers(1, 3),
    shard_size=st.integers(1, 10),
    flush_every=st.integers(1, 20),
    client_s=st.floats(0, 0.5),
    put_s=st.floats(0, 5),
    task_s=st.floats(0, 0.5),
    writers=st.integers(1, 4),
    seed=st.integers(0, 99),
)


def _with(flow: Flow, **changes: Any) -> Flow:
    return Flow(**{**flow.model_dump(), **changes})


# --- laws


@settings(max_examples=150, deadline=None)
@given(flow=flows)
def test_undisturbed_every_rollout_is_made_once_and_no_resource_is_busy_for_longer_than_the_run(flow: Flow) -> None:
    outcome = simulate.simulate(flow)
    counts = outcome.counts
    assert (counts.finished, counts.failed, counts.redone, counts.tried_again) == (flow.rollouts, 0, 0, 0)
    assert (counts.rows, counts.calls) == (flow.rollouts, flow.rollouts * flow.turns)
    assert flow.flush_every
    # a shard's rollouts end one after the other here, so a part before the shard's last holds as many as may wait
    assert flow.shards <= counts.parts <= flow.shards + flow.rollouts // flow.flush_every
    assert len(counts.ends) == len(counts.starts) == flow.shards
    assert all(seconds <= counts.seconds * (1 + 1e-9) for seconds in outcome.alone_s.values())
    assert set(outcome.limits) <= set(outcome.alone_s)


@settings(max_examples=100, deadline=None)
@given(flow=flows, share=st.floats(0, 0.4), kills=st.floats(0, 20), retries=st.integers(0, 2), passes=st.integers(1, 3))
def test_with_failures_and_kills_nothing_is_lost(
    flow: Flow, share: float, kills: float, retries: int, passes: int
) -> None:
    hard = {"failure_share": share, "kills_per_hour": kills, "max_retries": retries, "passes": passes, "restart_s": 5}
    flow = _with(flow, **hard, service_s=1.0, flush_every=1)
    counts = simulate.simulate(flow).counts
    assert counts.finished + counts.failed == flow.rollouts
    assert flow.rollouts <= counts.rows <= flow.rollouts + counts.tried_again
    assert counts.kills or (counts.rows, counts.redone) == (flow.rollouts + counts.tried_again, 0)
    assert counts.calls >= counts.finished * flow.turns + counts.failed
    again = simulate.simulate(flow).counts
    assert (again.calls, again.seconds, again.parts) == (counts.calls, counts.seconds, counts.parts)


@settings(max_examples=100, deadline=None)
@given(flow=flows, kills=st.sampled_from([0, 20]))
def test_only_so_many_task_runs_are_under_way(flow: Flow, kills: int) -> None:
    counts = simulate.simulate(_with(flow, kills_per_hour=kills, service_s=1.0, flush_every=1, restart_s=5)).counts
    if counts.kills:  # a task run that was killed has no end
        assert len(counts.starts) > len(counts.ends) >= flow.shards
        return
    under_way = most = 0
    for _, change in sorted([(at, 1) for at in counts.starts] + [(at, -1) for at in counts.ends]):
        under_way += change
        most = max(most, under_way)
    assert most <= min(flow.shards, flow.workers * collect.shards_at_once(flow.concurrency))


@settings(max_examples=100, deadline=None)
@given(flow=flows, more=st.sampled_from(["servers", "sequences"]))
def test_more_servers_are_never_slower(flow: Flow, more: str) -> None:
    free = _with(flow, **FREE)
    faster = _with(free, **{more: getattr(free, more) + 1})
    assert simulate.simulate(faster).counts.seconds <= simulate.simulate(free).counts.seconds * (1 + 1e-9)


# --- queues whose answer is known


@settings(max_examples=50, deadline=None)
@given(waves=st.integers(1, 5), at_once=st.integers(1, 20), turns=st.integers(1, 4), servers=st.integers(1, 3))
def test_full_waves_keep_the_server_busy_to_the_end(waves: int, at_once: int, turns: int, servers: int) -> None:
    flow = Flow(
        rollouts=waves * at_once * servers,
        turns=turns,
        service_s=2.0,
        servers=servers,
        sequences=at_once,
        concurrency=at_once * servers,
        **FREE,
    )
    outcome = simulate.simulate(flow)
    assert outcome.counts.seconds == pytest.approx(waves * turns * 2.0)
    assert outcome.limits[0] == "server"


@pytest.mark.parametrize(
    ("changes", "limit"),
    [
        ({"servers": 1}, "server"),
        ({"concurrency": 2}, "gate"),
        ({"client_s": 1.0}, "client core"),
        ({"task_s": 100.0}, "orchestrator"),
        ({"put_s": 500.0, "writers": 1}, "storage"),
        ({"rollouts": 3}, "one rollout's turns"),
    ],
)
def test_what_is_scarce_limits(changes: dict[str, Any], limit: str) -> None:
    plenty = {"rollouts": 640, "turns": 4, "service_s": 1.0, "servers": 20, "sequences": 8, "concurrency": 100, **FREE}
    assert simulate.simulate(Flow(**{**plenty, **changes})).limits == [limit]


def test_a_kill_costs_what_is_under_way_and_what_no_part_holds() -> None:
    """No part is ever written before the shard's end, so each kill costs all rollouts that were begun."""
    flow = Flow(
        **{"rollouts": 64, "turns": 1, "service_s": 60, "servers": 1, "sequences": 4, "concurrency": 4},
        **{"flush_every": 64, "kills_per_hour": 3, "restart_s": 0, "seed": 3, **FREE},
    )
    counts = simulate.simulate(flow).counts
    assert counts.kills > 0
    assert counts.redone > 4 * counts.kills
    assert (counts.parts, counts.rows) == (1, 64)
    often = simulate.simulate(_with(flow, flush_every=1)).counts
    assert often.redone == 4 * often.kills  # those under way; what had ended was in a part


@settings(max_examples=100, deadline=None)
@given(flow=flows, kills=st.floats(1, 20))
def test_a_kill_costs_what_is_under_way_and_less_than_what_is_flushed_together(flow: Flow, kills: float) -> None:
    flow = _with(flow, kills_per_hour=kills, restart_s=5, service_s=1.0, put_s=0.0)
    counts = simulate.simulate(flow).counts
    assert flow.flush_every
    assert counts.redone <= counts.kills * (flow.concurrency + flow.flush_every - 1)


def test_workers_start_their_task_runs_side_by_side() -> None:
    flow = Flow(
        **{"rollouts": 40, "turns": 1, "service_s": 1, "servers": 1, "sequences": 40, "concurrency": 10, "workers": 4},
        **{**FREE, "samples": 1, "shard_size": 2, "task_s": 10.0, "put_s": 0.25},
    )
    outcome = simulate.simulate(flow)
    assert outcome.counts.seconds == 5 * 10.0 + 1.25  # twenty shards, five of them each worker's
    assert (outcome.messages, outcome.messages_per_s) == (20 * 3, 4 * 2)


def test_a_run_that_cannot_end_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not end"):
        simulate.simulate(
            Flow(
                **{"rollouts": 8, "turns": 9, "service_s": 600, "servers": 1, "sequences": 1, "concurrency": 1},
                kills_per_hour=100,
            )
        )


# --- the broker, and the failing calls


@given(times=st.lists(st.floats(0, 100), max_size=200), capacity=st.integers(1, 50), per_s=st.floats(0.01, 100))
def test_the_broker_holds_what_it_can(times: list[float], capacity: int, per_s: float) -> None:
    peak, lost = simulate.broker(sorted(times), capacity, per_s)
    assert 0 <= peak <= capacity
    assert 0 <= lost <= max(0, len(times) - capacity)
    assert lost == 0 or peak > capacity - 1
    assert simulate.broker(sorted(times), capacity + 1, per_s)[1] <= lost


def test_a_burst_loses_what_does_not_fit() -> None:
    assert simulate.broker([0.0] * 30, 10, 1.0) == (10, 20)
    assert simulate.broker([float(n) for n in range(30)], 10, 1.0) == (1, 0)


@given(share=st.floats(0.01, 1), seed=st.integers(0, 99))
def test_failing_calls_ascend(share: float, seed: int) -> None:
    found = failing_calls(share, seed)
    numbers = [next(found) for _ in range(20)]
    assert numbers == sorted(set(numbers))
    assert numbers[0] >= 1
    assert next(failing_calls(0.0, seed), None) is None


# --- the real collection beside it


def _inputs(root: str, questions: int) -> dict[str, Artifact]:
    def stored(rows: list[dict[str, Any]], name: str) -> Artifact:
        schema = next(known for known in TABLES if known.startswith(f"{name}/"))
        return artifact.write_table(artifact.table_of(rows, schema), storage.join(root, f"{name}.parquet"), schema, {})

    page = {"file": "a.pdf", "page_number": 1, "total_pages": 1, "title": "a", "text": "The device weighs 4 kg."}
    asked = [
        {"question_id": f"q{n}", "question": f"How heavy is device {n}?", "answers": [["4 kg"]], "split": "train"}
        for n in range(questions)
    ]
    made = {"pages": stored([page], "pages"), "questions": stored(asked, "questions")}
    return made | {"index": build_index(made["pages"], config.Index(), storage.join(root, "index"))}


async def _collect(root: str, url: str, flow: Flow) -> list[collect.Shard]:
    """The real shards of a flow, run as often as its passes say."""
    inputs = _inputs(root, flow.rollouts // flow.samples)
    chosen = config.Collect(samples=flow.samples, shard_size=flow.shard_size, flush_every=flow.flush_every)
    shards = collect.plan(inputs["questions"], chosen, "key")
    async with collect.open_attempts(
        **inputs,
        agent=config.Agent(),
        search=config.Search(),
        sampling=config.Sampling(),
        server=config.Server(base_url=url, model="base", concurrency=flow.concurrency, max_retries=flow.max_retries),
        root=root,
        fingerprints={"model_fingerprint": "m", "index_fingerprint": "i", "code_fingerprint": "c"},
    ) as attempt:
        for _ in range(flow.passes):
            unwritten = Unwritten(flow.flush_every or flow.concurrency)
            run = [collect.run_shard(s, uri=f"{root}/run", unwritten=unwritten, attempt=attempt) for s in shards]
            await asyncio.gather(*run)
    return shards


def _answers_at_once(request: dict[str, Any], call: int) -> Reply:
    seen = {**request, "messages": [*request["messages"], {"role": "tool", "content": "<results"}]}
    return dutiful_agent(seen, call)


SERVER = {"service_s": 0.01, "servers": 1, "sequences": 16, "concurrency": 16}


@pytest.mark.parametrize(
    ("flow", "fails"),
    [
        # So many never wait that a part is written before its shard's end: how fast they come does not decide how many there are.
        pytest.param(
            Flow(rollouts=200, turns=2, samples=4, shard_size=8, flush_every=100, **SERVER), (), id="nothing fails"
        ),
        pytest.param(
            Flow(rollouts=200, turns=2, samples=4, shard_size=8, flush_every=100, max_retries=4, **SERVER),
            (5, 50, 51, 222),
            id="failed calls are tried again",
        ),
        pytest.param(
            Flow(rollouts=200, turns=1, samples=4, shard_size=50, flush_every=100, max_retries=0, passes=3, **SERVER),
            (1, 17, 60, 199, 202),
            id="failed rollouts are run again",
        ),
    ],
)
def test_the_real_collection_counts_the_same(tmp_path, flow: Flow, fails: Collection[int]) -> None:
    script = dutiful_agent if flow.turns == 2 else _answers_at_once
    with ModelServer(
        lambda request, call: Status(503) if call in fails else script(request, call), delay_s=0.01
    ) as server:
        shards = asyncio.run(_collect(str(tmp_path), server.url, flow))
        calls = server.calls
    rows = artifact.read_parts(f"{tmp_path}/run", collect.SCHEMA, ["status", "turns"]).to_pylist()
    parts = list(storage.iter_files(f"{tmp_path}/run"))
    counts = simulate.simulate(flow, iter(fails)).counts
    assert (counts.calls, counts.rows, counts.parts) == (calls, len(rows), len(parts))
    assert counts.finished == sum(row["status"] == "finished" for row in rows) == flow.rollouts
    assert counts.tried_again == sum(row["status"] == "failed" for row in rows)
    assert {len(row["turns"]) for row in rows if row["status"] == "finished"} == {flow.turns}
    assert len(shards) == flow.shards
    folded = collect.fold(shards, f"{tmp_path}/run", f"{tmp_path}/out.parquet", {})
    assert folded.rows == counts.finished + counts.failed


# --- the command


NEEDED = ["--rollouts", "100", "--turns", "2", "--service-s", "1", "--servers", "1", "--sequences", "8"]


def test_the_command_prints_a_table_and_says_what_breaks(capsys: pytest.CaptureFixture[str]) -> None:
    many = ["--concurrency", "8", "--shard-size", "1", "--samples", "1", "--broker-messages", "9", "--row-bytes", "1e9"]
    assert simulate.main([*NEEDED, *many]) == 0
    said = capsys.readouterr().out
    assert "100 rollouts, simulated" in said
    assert "limits: have more of it" in said
    assert said.count("breaks:") == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--rollouts: Field required"),
        ([*NEEDED, "--concurrency", "none"], "--concurrency: Input should be a valid integer"),
        ([*NEEDED, "--concurrency", "8", "--service-s", "nan"], "--service-s: Input should be"),
        ([*NEEDED, "--concurrency", "8", "--failure-share", "2"], "--failure-share: Input should be"),
    ],
)
def test_bad_settings_end_with_2_and_no_traceback(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert simulate.main(arguments) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert "Traceback" not in shown


def test_sizes_are_finite_and_grow() -> None:
    small, large = (
        simulate.simulate(Flow(rollouts=n, turns=1, service_s=1, servers=1, sequences=9, concurrency=9))
        for n in (9, 99)
    )
    for name in ("part_bytes", "folded_bytes", "collect_memory", "fold_memory", "open_memory", "fold_s", "puts"):
        assert 0 < getattr(small, name) <= getattr(large, name) < math.inf
