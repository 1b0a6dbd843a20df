"""What collection costs over the bare openai client, and the whole stage over the bare rollouts.

    python -m tests.bench.bench_collect [--quick]

Needs nothing but the project: the model server is tests/model_server.py in a process of its own, which takes 0.2 s for
every call and lets a rollout search three times before it answers. About four minutes on two cores; --quick, one.

The first number: rollouts of four turns through `open_attempts` and `run_shard`, 64 at once, against the default
`openai.AsyncOpenAI` sending the very same requests, turn after turn, 64 conversations at once. Sending a request and reading
its answer is all that the peer does; ours also searches, reads pages, builds the conversation and stores it.

The second: the stage that `drag collect` runs, from a flow's start to its end on a Prefect server of its own: shards as task
runs, attempts flushed to Parquet, parts folded into one artifact; against the same rollouts alone, whose rows are thrown away.
"""

import asyncio
import random
import re
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from prefect import flow

from flows.collect import collected
from flows.embedded import own_server
from flows.serving import model_server
from tasks import artifact, collect, config, refs, storage
from tasks.artifact import Artifact
from tasks.schemas import TABLES
from tasks.search.index import build_index
from tasks.unwritten import Unwritten
from tests.bench import harness
from tests.model_server import ModelServer, Reply, dutiful_agent

SERVICE_S = 0.2
AT_ONCE = 64
TURNS = 4
PAGES = 500
COLLECT = config.Collect(split="all")
AGENT = config.Agent(protocol="tools", max_iterations=TURNS + 1)


def run(quick: bool = False) -> list[harness.Row]:
    """Measure; one row a number.

    Ours and the peers take turns, and the best round of each counts: what else the machine does can only slow them.
    """
    rollouts, rounds = (192, 1) if quick else (1000, 3)
    ours, peer, stage, alone = [], [], [], []
    with tempfile.TemporaryDirectory() as root, harness.served("tests.bench.bench_collect") as url:
        inputs = _inputs(root, rollouts)
        sent = _recorded(inputs)
        with own_server(Path(root, "home")):
            asyncio.run(
                harness.time_peer(url, sent[:AT_ONCE], AT_ONCE)
            )  # what is loaded and cached once is paid for here
            asyncio.run(_time_alone(url, inputs))
            _time_stage(url, inputs, f"{root}/first")
            for round_ in range(rounds):
                peer.append(asyncio.run(harness.time_peer(url, sent, AT_ONCE)))
                ours.append(asyncio.run(_time_shards(url, inputs, f"{root}/shards{round_}")))
                alone.append(asyncio.run(_time_alone(url, inputs)))
                stage.append(_time_stage(url, inputs, f"{root}/stage{round_}"))
    calls = sum(map(len, sent))
    first = f"collect, {AT_ONCE} rollouts at once, against the bare openai client"
    second = f"collect as a Prefect stage, {rollouts} rollouts, against the rollouts alone"
    return [
        harness.row(first, calls / min(ours), calls / min(peer), "≥ 0.95", "calls/s"),
        harness.row(second, min(stage), min(alone), "≤ 1.05", "s"),
    ]


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


@asynccontextmanager
async def _attempts(url: str, inputs: dict[str, Artifact]) -> AsyncIterator[collect.Attempt]:
    async with collect.open_attempts(
        **inputs,
        agent=AGENT,
        search=config.Search(),
        sampling=config.Sampling(),
        server=_server(url),
        root=inputs["pages"].uri.rpartition("/")[0],
        fingerprints={"model_fingerprint": "m", "index_fingerprint": "i", "code_fingerprint": "c"},
    ) as attempt:
        yield attempt


def _server(url: str) -> config.Server:
    return config.Server(base_url=url, model="base", concurrency=AT_ONCE)


async def _time_shards(url: str, inputs: dict[str, Artifact], uri: str) -> float:
    """Seconds that all shards of a fresh run take in one event loop, without Prefect."""
    shards = collect.plan(inputs["questions"], COLLECT, "bench")
    async with _attempts(url, inputs) as attempt:
        start = time.perf_counter()
        unwritten = Unwritten(AT_ONCE)
        runs = (collect.run_shard(s, uri=uri, unwritten=unwritten, attempt=attempt) for s in shards)
        await asyncio.gather(*runs)
        took = time.perf_counter() - start
    stored = artifact.read_parts(uri, collect.SCHEMA, ["status"])["status"].to_pylist()
    assert stored == ["finished"] * inputs["questions"].rows
    return took


def _time_stage(url: str, inputs: dict[str, Artifact], root: str) -> float:
    """Seconds that the whole stage takes within a flow, from the call of the flow to its end."""
    for name, made in inputs.items():
        refs.save_ref(root, name, made)
    settings = config.CollectRun(storage=root, collect=COLLECT, agent=AGENT, server=_server(url))

    @flow(name="bench")
    def bench() -> Artifact:
        with model_server(settings.server, settings.serve, root) as connect:
            return collected(root, settings, connect, None, "bench", check_first=False).artifacts["trajectories"]

    start = time.perf_counter()
    made = bench()
    took = time.perf_counter() - start
    stored = artifact.read_table(made, ["status"])["status"].to_pylist()
    assert stored == ["finished"] * inputs["questions"].rows
    return took


async def _time_alone(url: str, inputs: dict[str, Artifact]) -> float:
    """Seconds that the same rollouts take in one event loop, from opening pages and index to the last one's end."""
    shards = collect.plan(inputs["questions"], COLLECT, "bench")
    start = time.perf_counter()
    async with _attempts(url, inputs) as attempt:
        await asyncio.gather(*(attempt(spec, 1) for shard in shards for spec in shard.rollouts))
    return time.perf_counter() - start


def _recorded(inputs: dict[str, Artifact]) -> list[list[Mapping[str, Any]]]:
    """The requests of every rollout, turn after turn, as a server was sent them."""
    with ModelServer(_searching) as server:
        asyncio.run(_time_alone(server.url, inputs))
        return harness.conversations(server.requests, TURNS)


def _searching(request: dict[str, Any], call: int) -> Reply:
    """An agent that searches for words of the best page seen last, and answers in its last turn."""
    messages = request["messages"]
    if sum(message["role"] == "assistant" for message in messages) == TURNS - 1:
        return dutiful_agent(request, call)
    words = " ".join(re.findall(r"\w{4,}", messages[-1]["content"])[-6:])
    return Reply(None, tool_calls=[("search_documents", f'{{"query": "{words}"}}')], finish_reason="tool_calls")


async def _listen() -> str:
    server = ModelServer(_searching, delay_s=SERVICE_S, keep=False)
    await server.listen(0)
    return server.url


if __name__ == "__main__":
    harness.main(__doc__, run, _listen)
