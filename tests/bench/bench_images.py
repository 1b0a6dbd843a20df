"""What collection with page images costs over the bare openai client that sends the same bytes.

    python -m tests.bench.bench_images [--quick]

The server takes 0.2 s for every call and reads no more of a request than it must; it says how long its context is and how many
tokens a request had, so ours counts before each whether it fits. Rollouts of four turns see three pages more in each, so a
request holds up to nine images, as base64; pages are rendered before anything is timed. The peer is the default
`openai.AsyncOpenAI`, sending the very same requests, turn after turn. About two minutes on two cores; --quick, half of one.
"""

import asyncio
import json
import random
import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pymupdf
from aiohttp import web

from tasks import artifact, collect, config, documents
from tasks.artifact import Artifact
from tasks.search.index import build_index
from tasks.unwritten import Unwritten
from tests.bench import harness

SERVICE_S = 0.2
AT_ONCE = (8, 64)
TURNS = 4
DOCUMENTS, PAGES = 10, 6
WORDS = [f"word{n}" for n in range(40)]
CONTEXT = 32_768
AGENT = config.Agent(protocol="tags", observation="image", max_iterations=TURNS, top_k=3)


def run(quick: bool = False) -> list[harness.Row]:
    """Measure; one row a number of rollouts at once.

    Ours and the peer take turns, and the best round of each counts: what else the machine does can only slow them.
    """
    rounds = 1 if quick else 3
    rows = []
    with tempfile.TemporaryDirectory() as root, harness.served("tests.bench.bench_images") as url:
        for at_once in AT_ONCE:
            inputs = _inputs(Path(root) / str(at_once), 32 if at_once == 8 else 64 if quick else 128)
            sent = asyncio.run(_recorded(inputs))
            asyncio.run(harness.time_peer(url, sent[:at_once], at_once))
            ours, peer = [], []
            for _ in range(rounds):
                peer.append(asyncio.run(harness.time_peer(url, sent, at_once)))
                ours.append(asyncio.run(_time_ours(url, inputs, at_once)))
            name = f"collect with page images, {at_once} rollouts at once, against the bare openai client"
            calls = sum(map(len, sent))
            rows.append(harness.row(name, calls / min(ours), calls / min(peer), "≥ 0.95", "calls/s"))
    return rows


def _inputs(folder: Path, rollouts: int) -> dict[str, Artifact]:
    """PDFs of pages full of words, an index, and a question for each rollout."""
    draw = random.Random(0)
    (folder / "pdfs").mkdir(parents=True)
    for n in range(DOCUMENTS):
        pdf = pymupdf.open()
        for _ in range(PAGES):
            page = pdf.new_page()
            for line in range(50):
                page.insert_text((50, 60 + 14 * line), " ".join(draw.choices(WORDS, k=12)))
        pdf.save(folder / "pdfs" / f"{n}.pdf")
    settings = config.Ingest(documents=str(folder / "pdfs"))
    pages, _ = documents.read_documents(settings, f"{folder}/pages.parquet", f"{folder}/aside.parquet")
    rows = [{"question_id": f"q{n}", "question": f"What of {n}?", "split": "train"} for n in range(rollouts)]
    table = artifact.table_of(rows, "questions/1")
    questions = artifact.write_table(table, f"{folder}/questions.parquet", "questions/1", {})
    return {"pages": pages, "questions": questions, "index": build_index(pages, config.Index(), f"{folder}/index")}


async def _time_ours(url: str, inputs: dict[str, Artifact], at_once: int) -> float:
    """Seconds that all rollouts take, in shards that are stored."""
    settings = config.Collect(split="all")
    shards = collect.plan(inputs["questions"], settings, "bench")
    root = inputs["pages"].uri.rpartition("/")[0]
    with tempfile.TemporaryDirectory(dir=root) as uri:
        async with collect.open_attempts(
            **inputs,
            agent=AGENT,
            search=config.Search(),
            sampling=config.Sampling(),
            server=config.Server(base_url=url, model="base", concurrency=at_once),
            root=root,
            fingerprints={"model_fingerprint": "m", "index_fingerprint": "i", "code_fingerprint": "c"},
        ) as attempt:
            start = time.perf_counter()
            unwritten = Unwritten(at_once)
            runs = (collect.run_shard(s, uri=uri, unwritten=unwritten, attempt=attempt) for s in shards)
            await asyncio.gather(*runs)
            took = time.perf_counter() - start
        stored = artifact.read_parts(uri, collect.SCHEMA, ["status", "turns"]).to_pylist()
    assert {row["status"] for row in stored} == {"finished"}
    assert {tuple(turn["images_shown"] for turn in row["turns"]) for row in stored} == {(3, 3, 3, 0)}
    return took


async def _recorded(inputs: dict[str, Artifact]) -> list[list[Mapping[str, Any]]]:
    """The requests of every rollout, turn after turn, as a server was sent them; images are stored on the way."""
    bodies: list[bytes] = []
    runner, url = await _listen(0.0, bodies)
    await _time_ours(url, inputs, 16)
    await runner.cleanup()
    return harness.conversations(map(json.loads, bodies), TURNS)


async def _listen(delay_s: float, bodies: list[bytes] | None = None) -> tuple[web.AppRunner, str]:
    """A server of searches for two words that depend on seed and turn, and of an answer in the last turn."""

    async def chat(request: web.Request) -> web.Response:
        body = await request.read()
        if bodies is not None:
            bodies.append(body)
        await asyncio.sleep(delay_s)
        done = body.count(b'"role":"assistant"')
        seed = re.search(rb'"seed":(\d+)', body)
        assert seed is not None
        words = " ".join(random.Random(int(seed[1]) + done).choices(WORDS, k=2))
        said = "<answer>42</answer>" if done == TURNS - 1 else f"<search>{words}</search>"
        choice = {"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
        head = {"id": "x", "object": "chat.completion", "created": 0, "model": "base"}
        tokens = 200 + 1300 * body.count(b'"image_url"') // 2  # the word stands twice for each image
        usage = {"prompt_tokens": tokens, "completion_tokens": 20, "total_tokens": tokens + 20}
        return web.json_response({**head, "choices": [choice], "usage": usage})

    async def models(request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "base", "max_model_len": CONTEXT}]})

    app = web.Application(client_max_size=1 << 30)
    app.add_routes([web.post("/v1/chat/completions", chat), web.get("/v1/models", models)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
    return runner, f"http://127.0.0.1:{runner.addresses[0][1]}/v1"


async def _serve() -> str:
    _, url = await _listen(SERVICE_S)
    return url


if __name__ == "__main__":
    harness.main(__doc__, run, _serve)
