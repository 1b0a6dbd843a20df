"""A small, real, OpenAI-compatible server whose replies and faults are scripted: what tests and benches talk to.

In a test, in a thread of its own:

    with ModelServer(lambda request, call: Reply("<answer>42</answer>"), delay_s=0.2) as server:
        ...  # server.url, server.calls, server.requests

As a process, answering as a dutiful agent does (one search, then an answer), and telling its counts at /counts:

    python tests/model_server.py --port 8000 --delay 0.2 [--fail-every 5] [--end-after 100]
"""

import argparse
import asyncio
import json
import os
import re
import threading
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web


@dataclass(frozen=True)
class Reply:
    """What the model is to say. `tool_calls` are (name, arguments as JSON text), as a server's tool parser gives them."""

    content: str | None = ""
    reasoning: str | None = None
    tool_calls: Sequence[tuple[str, str]] = ()
    finish_reason: str = "stop"


@dataclass(frozen=True)
class Status:
    """An HTTP error, or any other body."""

    code: int
    body: str = '{"error": {"message": "scripted", "type": "scripted"}}'
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Hang:
    """Take the request and never answer."""


@dataclass(frozen=True)
class Drop:
    """Break the connection without an answer."""


@dataclass(frozen=True)
class Die:
    """Break every connection and take no more, as a server that was killed."""


Script = Callable[[dict[str, Any], int], "Reply | Status | Hang | Drop | Die"]
"""(request body, number of the call from 1) → what happens."""


def dutiful_agent(request: dict[str, Any], call: int) -> Reply:
    """Search once for the question's longer words, then answer; by tool calls if the request has tools, else by tags."""
    del call
    messages = request["messages"]
    asked = [m for m in messages if m["role"] == "user"]
    seen = messages[-1]["role"] == "tool" or "<results" in str(messages[-1]["content"])
    words = " ".join(re.findall(r"\w{4,}", str(asked[-1]["content"]))[:6]) or "report"
    if request.get("tools"):
        if seen or isinstance(request.get("tool_choice"), dict):
            arguments = json.dumps({"answer": ["42"], "citations": []})
            return Reply(None, tool_calls=[("provide_answer", arguments)], finish_reason="tool_calls")
        return Reply(None, tool_calls=[("search_documents", json.dumps({"query": words}))], finish_reason="tool_calls")
    return Reply("<answer>42</answer>" if seen else f"<think>I need the page.</think>\n<search>{words}</search>")


class ModelServer:
    """The server, in a thread of its own with a loop of its own. It counts calls and keeps request bodies."""

    def __init__(
        self, script: Script = dutiful_agent, *, delay_s: float = 0.0, keep: bool = True, port: int = 0
    ) -> None:
        self.script, self.delay_s, self.keep, self.port = script, delay_s, keep, port
        self.calls = 0
        self.in_flight = 0
        self.most_in_flight = 0
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.models = ["base"]
        self.holding = False  # as long as it is, no call is answered
        self.max_model_len: int | None = None  # tokens, as this server counts them, that it takes and says that it does
        self.refused = 0  # requests that were longer
        self.ill: Status | Hang | None = None  # what /health says instead of 200
        self.asked_for_models = 0
        self._on_death: Callable[[], None] = lambda: None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> "ModelServer":
        ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._in_thread(ready)), daemon=True)
        self._thread.start()
        if not ready.wait(10):
            raise RuntimeError("the model server did not start")
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(lambda: (self._gone.set(), self._stop.set()))
        self._thread.join(10)

    async def _in_thread(self, ready: threading.Event) -> None:
        self._loop, self._gone, self._stop = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
        runner = await self.listen(self.port)
        self._on_death = self._gone.set
        ready.set()
        await self._gone.wait()
        await runner.cleanup()
        await self._stop.wait()

    async def listen(self, port: int) -> web.AppRunner:
        """Serve on a port, 0 for a free one, until the returned runner is cleaned up."""
        app = web.Application(client_max_size=1 << 28)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/load_lora_adapter", self._load)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_get("/health", self._health)
        app.router.add_get("/counts", self._counts)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.01)  # 0 would wait for hanging requests
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", port, backlog=1024)
        await site.start()
        self.port = runner.addresses[0][1]
        return runner

    async def _models(self, request: web.Request) -> web.Response:
        self.asked_for_models += 1
        length = {} if self.max_model_len is None else {"max_model_len": self.max_model_len}
        data = [{"id": name, "object": "model", **length} for name in self.models]
        return web.json_response({"object": "list", "data": data})

    async def _tokenize(self, request: web.Request) -> web.Response:
        if self.max_model_len is None:
            return web.Response(status=404)
        return web.json_response({"count": count_tokens(await request.json()), "max_model_len": self.max_model_len})

    async def _load(self, request: web.Request) -> web.Response:
        self.models.append((await request.json())["lora_name"])
        return web.Response()

    async def _health(self, request: web.Request) -> web.Response:
        match self.ill:
            case Status(code, text, headers):
                return web.Response(status=code, text=text, headers=headers)
            case Hang():
                await asyncio.sleep(3600)
        return web.Response()

    async def _counts(self, request: web.Request) -> web.Response:
        return web.json_response({"calls": self.calls, "most_in_flight": self.most_in_flight, "pid": os.getpid()})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read())
        self.calls += 1
        call = self.calls
        if self.keep:
            self.requests.append(body)
            self.headers.append(dict(request.headers))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            if self.max_model_len is not None and count_tokens(body) + body["max_tokens"] > self.max_model_len:
                self.refused += 1
                return web.Response(status=400, text="This model's maximum context length is exceeded.")
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            while self.holding:
                await asyncio.sleep(0.05)
            return await self._act(request, body, call)
        finally:
            self.in_flight -= 1

    async def _act(self, request: web.Request, body: dict[str, Any], call: int) -> web.StreamResponse:
        match self.script(body, call):
            case Reply() as reply:
                return web.Response(
                    text=json.dumps(_completion(body, reply, call, self.max_model_len is not None)),
                    content_type="application/json",
                )
            case Status(code, text, headers):
                return web.Response(status=code, text=text, headers=headers, content_type="application/json")
            case Hang():
                await asyncio.sleep(3600)
            case Die():
                self._on_death()
        if request.transport is not None:
            request.transport.abort()
        return web.Response(status=500)


def count_tokens(body: dict[str, Any]) -> int:
    """A token for every two letters, as bad as text gets, and for every square of 32 × 32 pixels of an image."""
    import pymupdf

    tokens = len(json.dumps(body.get("tools") or "", ensure_ascii=False)) // 2
    for message in body["messages"]:
        content = message.get("content") or ""
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        calls = "".join(json.dumps(call["function"]) for call in message.get("tool_calls") or ())
        tokens += 8 + (len(calls) + sum(len(part.get("text", "")) for part in parts)) // 2
        for part in parts:
            if part["type"] == "image_url":
                image = pymupdf.Pixmap(received(part["image_url"]["url"]))
                tokens += round(image.width / 32) * round(image.height / 32) + 2
    return tokens


def received(url: str) -> bytes:
    """What a server gets by an image's address."""
    with urllib.request.urlopen(url) as answer:
        return answer.read()


def _completion(body: dict[str, Any], reply: Reply, call: int, counts: bool) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": reply.content}
    if reply.reasoning is not None:
        message["reasoning"] = reply.reasoning
    if reply.tool_calls:
        message["tool_calls"] = [
            {"id": f"call-{call}-{n}", "type": "function", "function": {"name": name, "arguments": arguments}}
            for n, (name, arguments) in enumerate(reply.tool_calls)
        ]
    prompt = count_tokens(body) if counts else sum(len(str(m.get("content") or "")) for m in body["messages"]) // 4
    written = len(reply.content or "") // 4 + 1
    return {
        "id": f"chatcmpl-{call}",
        "object": "chat.completion",
        "created": 0,
        "model": body["model"],
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": reply.finish_reason}],
        "usage": {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written},
    }


async def _serve(port: int, delay_s: float, fail_every: int, end: str, end_after: int) -> None:
    def script(request: dict[str, Any], call: int) -> Reply | Status | Hang | Die:
        if end_after and call > end_after:
            if end == "die":
                return Die()
            server.ill = Status(503) if end == "ill" else Hang()
            return Status(500) if end == "ill" else Hang()
        return Status(503) if fail_every and call % fail_every == 0 else dutiful_agent(request, call)

    server = ModelServer(script, delay_s=delay_s, keep=False)
    server._on_death = lambda: os._exit(1)
    await server.listen(port)
    print(server.url, flush=True)
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description="A scripted OpenAI-compatible server; prints its address.")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--delay", type=float, default=0.0, help="seconds every call takes")
    parser.add_argument("--fail-every", type=int, default=0, help="answer 503 to every so-manieth call")
    parser.add_argument("--end", choices=["die", "ill", "hang"], default="die", help="how it ends")
    parser.add_argument("--end-after", type=int, default=0, help="after so many calls; never when 0")
    args = parser.parse_args()
    asyncio.run(_serve(args.port, args.delay, args.fail_every, args.end, args.end_after))


if __name__ == "__main__":
    main()
