"""What collection costs over the bare openai client, and shards with Parquet over bare rollouts.

    python -m tests.bench.bench_collect [--quick]

Needs nothing but the project: the model server is tests/model_server.py in a process of its own, which takes 0.2 s for
every call and lets a rollout search three times before it answers. About three minutes on two cores; --quick, half of one.

The first number: rollouts of four turns through `open_attempts` and `run_shard`, 64 at once, against the default
`openai.AsyncOpenAI` sending the very same requests, turn after turn, 64 conversations at once. Sending a request and reading
its answer is all that the peer does; ours also searches, reads pages, builds the conversation and stores it.

The second: the same rollouts run in shards that write Parquet, against the rollouts alone. `run_all` says how shards are
run; by default in one event loop, which is how a flow runs them, but without its engine.
"""

import argparse
import asyncio
import contextlib
import random
import re
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any

import openai

from tasks import artifact, collect, config, storage
from tasks.artifact import Artifact
from tasks.collect import Shard, ShardReport
from tasks.schemas import TABLES
from tasks.search.index import build_index
from tests.model_server import ModelServer, Reply, dutiful_agent

SERVICE_S = 0.2
AT_ONCE = 64
TURNS = 4
PAGES = 500
COLLECT = config.Collect(split="all")

RunShard = Callable[[Shard], Awaitable[ShardReport]]
RunAll = Callable[[Sequence[Shard], RunShard], Awaitable[None]]


async def gather(shards: Sequence[Shard], run_shard: RunShard) -> None:
    """Run all shards in this event loop."""
    await asyncio.gather(*(run_shard(shard) for shard in shards))


def run(quick: bool = False, run_all: RunAll = gather) -> list[dict[str, Any]]:
    """Measure; one row a number: {name, ours, peer, ratio, target, unit}.

    Ours and the peer take turns, and the best round of each counts: what else the machine does can only slow them.
    """
    rollouts, rounds = (192, 1) if quick else (1000, 3)
    ours, peer, sharded, alone = [], [], [], []
    with tempfile.TemporaryDirectory() as root, _server() as url:
        inputs = _inputs(root, rollouts)
        conversations = _recorded(inputs)
        asyncio.run(_time_peer(url, conversations[:AT_ONCE]))  # what is loaded and cached once is paid for here
        asyncio.run(_time_alone(url, inputs))
        for _ in range(rounds):
            peer.append(asyncio.run(_time_peer(url, conversations)))
            ours.append(asyncio.run(_time_shards(url, inputs, root, gather)))
            alone.append(asyncio.run(_time_alone(url, inputs)))
            sharded.append(ours[-1] if run_all is gather else asyncio.run(_time_shards(url, inputs, root, run_all)))
    calls = sum(map(len, conversations))
    return [
        _row(
            f"collect, {AT_ONCE} rollouts at once, against the bare openai client",
            calls / min(ours),
            calls / min(peer),
            "≥ 0.95",
            "calls/s",
        ),
        _row(
            f"shards and Parquet, {rollouts} rollouts, against the rollouts alone",
            min(sharded),
            min(alone),
            "≤ 1.05",
            "s",
        ),
    ]


def _row(name: str, ours: float, peer: float, target: str, unit: str) -> dict[str, Any]:
    return {"name": name, "ours": ours, "peer": peer, "ratio": ours / peer, "target": target, "unit": unit}


def _inputs(root: str, rollouts: int) -> dict[str, Artifact]:
    """Pages of about 3,000 characters, an index, and a question for each rollout, all from made-up words."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnoprstuvw", k=draw.randint(3, 10))) for _ in range(5000)]

    def text(length: int) -> str:
        return " ".join(words[int(draw.paretovariate(0.6)) % len(words)] for _ in range(length))

    pages = [
        {"file": f"{n}.pdf", "page_number": 1, "total_pages": 1, "title": text(4), "text": text(400)}
        for n in range(PAGES)
    ]
    questions = [
        {
            "question_id": f"q{n}",
            "question": f"What is said of {text(8)}?",
            "answers": [["42"]],
            "answer_locations": [{"document": f"{n % PAGES}.pdf", "page": 1}],
            "split": "train",
        }
        for n in range(rollouts)
    ]

    def stored(rows: list[dict[str, Any]], name: str) -> Artifact:
        schema = next(known for known in TABLES if known.startswith(f"{name}/"))
        return artifact.write_table(artifact.table_of(rows, schema), storage.join(root, f"{name}.parquet"), schema, {})

    made = {"pages": stored(pages, "pages"), "questions": stored(questions, "questions")}
    return made | {"index": build_index(made["pages"], config.Index(), storage.join(root, "index"))}


@contextlib.asynccontextmanager
async def _attempts(url: str, inputs: dict[str, Artifact]) -> AsyncIterator[collect.Attempt]:
    async with collect.open_attempts(
        **inputs,
        agent=config.Agent(protocol="tools", max_iterations=TURNS + 1),
        search=config.Search(),
        sampling=config.Sampling(),
        server=config.Server(base_url=url, model="base", concurrency=AT_ONCE),
        root=inputs["pages"].uri.rpartition("/")[0],
        fingerprints={"model_fingerprint": "m", "index_fingerprint": "i", "code_fingerprint": "c"},
    ) as attempt:
        yield attempt


async def _time_shards(url: str, inputs: dict[str, Artifact], root: str, run_all: RunAll) -> float:
    """Seconds that all shards of a fresh run take."""
    shards = collect.plan(inputs["questions"], COLLECT, "bench")
    uri = storage.join(root, "runs", uuid.uuid4().hex)
    async with _attempts(url, inputs) as attempt:

        async def run_shard(shard: Shard) -> ShardReport:
            return await collect.run_shard(shard, uri=uri, flush_every=COLLECT.flush_every, attempt=attempt)

        start = time.perf_counter()
        await run_all(shards, run_shard)
        took = time.perf_counter() - start
    stored = artifact.read_parts(uri, collect.SCHEMA, ["status"])["status"].to_pylist()
    assert stored == ["finished"] * sum(len(shard.rollouts) for shard in shards)
    return took


async def _time_alone(url: str, inputs: dict[str, Artifact]) -> float:
    """Seconds that the same rollouts take without shards, whose rows are thrown away."""
    shards = collect.plan(inputs["questions"], COLLECT, "bench")
    async with _attempts(url, inputs) as attempt:
        start = time.perf_counter()
        await asyncio.gather(*(attempt(spec, 1) for shard in shards for spec in shard.rollouts))
        return time.perf_counter() - start


async def _time_peer(url: str, conversations: Sequence[Sequence[dict[str, Any]]]) -> float:
    """Seconds that the openai client, as it comes, takes for the same requests."""
    gate = asyncio.Semaphore(AT_ONCE)
    async with openai.AsyncOpenAI(base_url=url, api_key="EMPTY") as client:

        async def converse(requests: Sequence[dict[str, Any]]) -> None:
            async with gate:
                for request in requests:
                    await client.chat.completions.create(**request)

        start = time.perf_counter()
        await asyncio.gather(*(converse(requests) for requests in conversations))
        return time.perf_counter() - start


def _recorded(inputs: dict[str, Artifact]) -> list[list[dict[str, Any]]]:
    """The requests of every rollout, turn after turn, as a server was sent them."""
    with ModelServer(_searching) as server:
        asyncio.run(_time_alone(server.url, inputs))
        conversations: dict[int, list[dict[str, Any]]] = {}
        for request in server.requests:
            conversations.setdefault(request["seed"], []).append(request)
    assert {len(requests) for requests in conversations.values()} == {TURNS}
    return list(conversations.values())


def _searching(request: dict[str, Any], call: int) -> Reply:
    """An agent that searches for words of the best page seen last, and answers in its last turn."""
    messages = request["messages"]
    if sum(message["role"] == "assistant" for message in messages) == TURNS - 1:
        return dutiful_agent(request, call)
    words = " ".join(re.findall(r"\w{4,}", messages[-1]["content"])[-6:])
    return Reply(None, tool_calls=[("search_documents", f'{{"query": "{words}"}}')], finish_reason="tool_calls")


@contextlib.contextmanager
def _server() -> Iterator[str]:
    """Address of the model server, in a process of its own."""
    command = [sys.executable, "-m", "tests.bench.bench_collect", "--serve"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.kill()


async def _serve() -> None:
    server = ModelServer(_searching, delay_s=SERVICE_S, keep=False)
    await server.listen(0)
    print(server.url, flush=True)
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rollouts, one round")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        asyncio.run(_serve())
    else:
        for row in run(args.quick):
            print("{name}: {ours:.1f} {unit}, peer {peer:.1f}, ratio {ratio:.3f} (target {target})".format(**row))


if __name__ == "__main__":
    main()
