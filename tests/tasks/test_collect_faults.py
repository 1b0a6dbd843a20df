"""Collection against a real server that fails, and in a process that is killed: all ends finished or typed, nothing twice.

This file is also the program that the tests kill: python test_collect_faults.py ROOT BASE_URL
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks import artifact, collect, config, refs, storage
from tasks.artifact import Artifact
from tasks.collect import ShardReport
from tasks.schemas import TABLES
from tasks.search.index import build_index
from tasks.unwritten import Unwritten
from tests.model_server import Die, Drop, Hang, ModelServer, Reply, Status, dutiful_agent

ROOT = Path(__file__).parents[2]
QUESTIONS = 20
COLLECT = config.Collect(split="all", samples=2, shard_size=8, flush_every=5)
CONCURRENCY = 4
FINGERPRINTS = {"model_fingerprint": "m", "index_fingerprint": "i", "code_fingerprint": "c"}


def _inputs(root: str) -> dict[str, Artifact]:
    """Pages, questions and an index below `root`, and references to them."""
    names = [f"device{n:02d}" for n in range(QUESTIONS)]
    pages = [
        {"file": f"{name}.pdf", "page_number": 1, "total_pages": 1, "title": name, "text": f"The {name} weighs {n} kg."}
        for n, name in enumerate(names)
    ]
    questions = [
        {
            "question_id": name,
            "question": f"How heavy is the {name}?",
            "answers": [[str(n)]],
            "answer_locations": [{"document": f"{name}.pdf", "page": 1}],
            "split": "train",
        }
        for n, name in enumerate(names)
    ]

    def stored(rows: list[dict[str, Any]], name: str) -> Artifact:
        schema = next(known for known in TABLES if known.startswith(f"{name}/"))
        return artifact.write_table(artifact.table_of(rows, schema), storage.join(root, f"{name}.parquet"), schema, {})

    found = {"pages": stored(pages, "pages"), "questions": stored(questions, "questions")}
    found["index"] = build_index(found["pages"], config.Index(), storage.join(root, "index"))
    for name, made in found.items():
        refs.save_ref(root, name, made)
    return found


async def _collect(
    root: str, inputs: dict[str, Artifact], base_url: str | list[str], *, protocol: str = "tools", **server: Any
) -> list[ShardReport]:
    """All shards of one run, as a flow runs them."""
    asked = config.Server(**{"base_url": base_url, "model": "base", "concurrency": CONCURRENCY} | server)
    async with collect.open_attempts(
        **inputs,
        agent=config.Agent(protocol=protocol),
        search=config.Search(),
        sampling=config.Sampling(),
        server=asked,
        root=root,
        fingerprints=FINGERPRINTS,
    ) as attempt:
        shards = collect.plan(inputs["questions"], COLLECT, "key")
        uri = storage.join(root, "run")
        unwritten = Unwritten(COLLECT.flush_every)
        runs = (collect.run_shard(s, uri=uri, unwritten=unwritten, attempt=attempt) for s in shards)
        return await asyncio.gather(*runs)


def _folded(root: str, inputs: dict[str, Artifact]) -> list[dict[str, Any]]:
    """The trajectories, checked to be one row a planned rollout in the order of the plan."""
    shards = collect.plan(inputs["questions"], COLLECT, "key")
    folded = collect.fold(shards, storage.join(root, "run"), storage.join(root, "trajectories.parquet"), FINGERPRINTS)
    rows = artifact.read_rows(folded)
    assert [r["rollout_id"] for r in rows] == [s.rollout_id for shard in shards for s in shard.rollouts]
    return rows


def _stored(root: str) -> list[dict[str, Any]]:
    return artifact.read_parts(storage.join(root, "run"), collect.SCHEMA).to_pylist()


def _outcomes(rows: list[dict[str, Any]]) -> Counter[str]:
    return Counter(r["outcome"] for r in rows)


def _by_seed(chosen: Callable[[int], bool], fault: Callable[[dict[str, Any], int], Any]) -> Any:
    """A script with a fault for the rollouts whose seed is chosen; the others are served."""
    return lambda request, call: (fault if chosen(request["seed"]) else dutiful_agent)(request, call)


@pytest.fixture
def server() -> Iterator[ModelServer]:
    with ModelServer() as server:
        yield server


@pytest.fixture
def local(tmp_path) -> tuple[str, dict[str, Artifact]]:
    return str(tmp_path), _inputs(str(tmp_path))


# --- kill -9


def _start(root: str, server: ModelServer) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, __file__, root, server.url], env={**os.environ, "PYTHONPATH": str(ROOT)})


def _until(met: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 60
    while not met():
        assert process.poll() is None, f"the collecting process ended by itself with {process.returncode}"
        assert time.monotonic() < end, "the collecting process did not get as far as expected"
        time.sleep(0.02)


async def test_killed_and_run_again_gives_every_rollout_and_none_twice(storage_root: str, server: ModelServer) -> None:
    inputs = _inputs(storage_root)
    answered: list[int] = []  # seeds of the rollouts that the server has answered to the end

    def hang_after_half(request: dict[str, Any], call: int) -> Reply | Hang:
        if len(answered) >= QUESTIONS:
            return Hang()
        reply = dutiful_agent(request, call)
        if reply.tool_calls[0][0] == "provide_answer":
            answered.append(request["seed"])
        return reply

    server.script = hang_after_half
    process = _start(storage_root, server)
    at_most_lost = COLLECT.flush_every - 1
    try:
        _until(
            lambda: server.in_flight == CONCURRENCY and len(_stored(storage_root)) >= QUESTIONS - at_most_lost, process
        )
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = {r["seed"] for r in _stored(storage_root)}
    assert kept <= set(answered)

    seen = len(server.requests)
    server.script = dutiful_agent
    await _collect(storage_root, inputs, server.url)
    rows = _folded(storage_root, inputs)
    assert _outcomes(rows) == {"answered": 2 * QUESTIONS}
    before, after = ({r["seed"] for r in part} for part in (server.requests[:seen], server.requests[seen:]))
    assert not kept & after, "a finished rollout was done again"
    assert len(before & after) <= at_most_lost + CONCURRENCY
    assert before | after == {r["seed"] for r in rows}
    assert Counter(r["rollout_id"] for r in _stored(storage_root)) == Counter(r["rollout_id"] for r in rows)

    calls = server.calls
    await _collect(storage_root, inputs, server.url)
    assert server.calls == calls


async def test_two_processes_at_once_disturb_nothing(storage_root: str, server: ModelServer) -> None:
    inputs = _inputs(storage_root)
    server.delay_s = 0.02
    process = _start(storage_root, server)
    try:
        _until(lambda: server.calls > 0, process)
        await _collect(storage_root, inputs, server.url)
        assert await asyncio.to_thread(process.wait, 60) == 0
    finally:
        process.kill()
    assert {r["attempt"] for r in _stored(storage_root)} == {1}
    assert _outcomes(_folded(storage_root, inputs)) == {"answered": 2 * QUESTIONS}


# --- faults of the server


@pytest.mark.parametrize("protocol", ["tools", "tags"])
async def test_every_row_says_what_happened(local, server: ModelServer, protocol: str) -> None:
    root, inputs = local
    server.delay_s = 0.02
    reports = await _collect(root, inputs, server.url, protocol=protocol)
    assert [(r.number, r.failed, r.tried_again) for r in reports] == [(0, {}, 0), (1, {}, 0), (2, {}, 0)]
    assert 1 < server.most_in_flight <= CONCURRENCY
    for row in _folded(root, inputs):
        assert (row["outcome"], row["answer"], row["protocol"]) == ("answered", ["42"], protocol)
        assert FINGERPRINTS.items() <= row.items()
        assert [turn["action"] for turn in row["turns"]] == ["search", "answer"]
        assert row["turns"][0]["searches"][0]["gt_rank"] == 1


async def test_a_server_that_answers_503_now_and_then_costs_no_rollout(local, server: ModelServer) -> None:
    root, inputs = local
    server.script = lambda request, call: (
        Status(503, headers={"Retry-After": "0"}) if call % 5 == 0 else dutiful_agent(request, call)
    )
    await _collect(root, inputs, server.url)
    assert _outcomes(_folded(root, inputs)) == {"answered": 2 * QUESTIONS}


@pytest.mark.parametrize(
    ("fault", "failure"),
    [
        (Status(503), "server_error"),
        (Status(200, "<html>Bad gateway</html>"), "server_error"),
        (Status(400, '{"error": {"message": "no \\ud800 such model"}}'), "http_status"),
        (Drop(), "connection"),
        (Hang(), "deadline"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
async def test_what_fails_is_typed_and_done_again_when_the_server_is_well(
    local, server: ModelServer, fault: Status | Drop | Hang, failure: str
) -> None:
    root, inputs = local
    server.script = _by_seed(lambda seed: seed % 4 == 0, lambda request, call: fault)
    in_time = 2.0 if isinstance(fault, Hang) else 60.0
    first = await _collect(root, inputs, server.url, max_retries=0, request_timeout=in_time)
    rows = _folded(root, inputs)
    ill = {r["seed"] for r in rows if r["seed"] % 4 == 0}
    assert {r["seed"] for r in rows if r["outcome"] == failure} == ill
    assert _outcomes(rows) == {"answered": len(rows) - len(ill), failure: len(ill)}
    assert sum(r.failed.get(failure, 0) for r in first) == len(ill)

    seen = len(server.requests)
    server.script = dutiful_agent
    second = await _collect(root, inputs, server.url)
    assert {r["seed"] for r in server.requests[seen:]} == ill
    assert sum(r.tried_again for r in second) == len(ill)
    rows = _folded(root, inputs)
    assert _outcomes(rows) == {"answered": 2 * QUESTIONS}
    assert {r["seed"] for r in rows if r["attempt"] == 2} == ill


async def test_a_rollout_that_takes_too_long_ends_at_its_deadline(local, server: ModelServer) -> None:
    root, inputs = local
    server.script = _by_seed(lambda seed: seed % 4 == 0, lambda request, call: Hang())
    await _collect(root, inputs, server.url, rollout_timeout=0.5)
    assert set(_outcomes(_folded(root, inputs))) == {"answered", "deadline"}


GARBLED = [
    Reply(None),
    Reply("\ud83d half a smiley"),
    Reply('<tool_call>{"name": "search_documents", "arguments": {"query": </tool_call>'),
    Reply("", tool_calls=[("search_documents", '{"query": "heavy')]),
    Reply("", tool_calls=[("search_documents", '{"query": ["not", "text"]}')]),
    Reply("", tool_calls=[("search_documents", '{"query": "\\ud800 AND (("}')]),
    Reply("", tool_calls=[("launch_missiles", "{}")]),
    Reply("", tool_calls=[("launch_missiles", "{}"), ("search_documents", '{"query": "device"}')]),
    Reply("", tool_calls=[("provide_answer", '{"answer": [["nested"]], "citations": 7}')]),
    Reply("", tool_calls=[("provide_answer", '{"answer": ["\\udfff"], "citations": [{"file": "a", "page": 1e300}]}')]),
    Reply("x" * 200_000, finish_reason="length"),
    Reply("", reasoning="\ud800" * 10),
]


@pytest.mark.parametrize("protocol", ["tools", "tags"])
async def test_a_model_that_garbles_its_calls_finishes_every_rollout(local, server: ModelServer, protocol: str) -> None:
    root, inputs = local
    server.script = lambda request, call: GARBLED[call % len(GARBLED)]
    await _collect(root, inputs, server.url, protocol=protocol)
    rows = _folded(root, inputs)
    assert {r["status"] for r in rows} == {"finished"}
    assert set(_outcomes(rows)) <= {"answered", "out_of_turns"}
    failures = {turn["failure"] for r in rows for turn in r["turns"]}
    expected = (
        {"no_action", "unparsable_call", "bad_arguments", "unknown_tool"} if protocol == "tools" else {"no_action"}
    )
    assert expected <= failures


@pytest.mark.parametrize(
    "odd",
    [
        {"finish_reason": 7},
        {"finish_reason": "\ud800"},
        {"message": {"tool_calls": [{"id": "\ud800", "function": {"name": "search_documents", "arguments": "{}"}}]}},
        {"usage": {"prompt_tokens": "many", "completion_tokens": 1e9}},
        {"usage": {"prompt_tokens": 10**12}},
        {"usage": []},
        {"message": {"content": ["parts"], "reasoning": {"no": "text"}}},
        {"message": None},
    ],
    ids=str,
)
async def test_an_odd_answer_never_stops_a_collection(local, server: ModelServer, odd: dict[str, Any]) -> None:
    root, inputs = local
    choice = {"message": {"content": "hm"}, "finish_reason": "stop"}
    choice |= {name: value for name, value in odd.items() if name != "usage"}
    body = json.dumps({"choices": [choice], "usage": odd.get("usage")})
    server.script = _by_seed(lambda seed: seed % 4 == 0, lambda request, call: Status(200, body))
    await _collect(root, inputs, server.url, max_retries=0)
    outcomes = _outcomes(_folded(root, inputs))
    assert set(outcomes) <= {"answered", "out_of_turns", "server_error"}
    assert outcomes["answered"] >= QUESTIONS


async def test_when_the_server_dies_the_rest_ends_at_once_and_a_new_server_goes_on(local) -> None:
    root, inputs = local
    with ModelServer(lambda request, call: Die() if call > QUESTIONS else dutiful_agent(request, call)) as dying:
        await _collect(root, inputs, dying.url, max_retries=1)
    rows = _folded(root, inputs)
    assert set(_outcomes(rows)) == {"answered", "connection"}
    lost = [r for r in rows if r["outcome"] == "connection"]
    tried = [r for r in lost if "not tried" not in r["failure_detail"]]
    assert len(tried) <= 2 + 2 * CONCURRENCY < len(lost)

    with ModelServer() as well:
        await _collect(root, inputs, well.url)
        assert {r["seed"] for r in well.requests} == {r["seed"] for r in lost}
    assert _outcomes(_folded(root, inputs)) == {"answered": 2 * QUESTIONS}


async def test_after_an_outage_the_same_run_goes_on(local, server: ModelServer) -> None:
    """Calls that fail while the server still answers for itself are tried on: an outage of calls is not its death."""
    root, inputs = local
    server.script = lambda request, call: Status(503) if call <= 3 * CONCURRENCY else dutiful_agent(request, call)
    await _collect(root, inputs, server.url, max_retries=0)
    outcomes = _outcomes(_folded(root, inputs))
    assert outcomes["server_error"] == 3 * CONCURRENCY
    assert outcomes["answered"] == 2 * QUESTIONS - 3 * CONCURRENCY


def main(root: str, base_url: str) -> None:
    inputs = {name: refs.load_ref(root, name) for name in ("pages", "questions", "index")}
    asyncio.run(_collect(root, inputs, base_url))


if __name__ == "__main__":
    main(*sys.argv[1:])
