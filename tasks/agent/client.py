"""Ask OpenAI-compatible servers, and try again where that can help.

The key comes from the environment variable OPENAI_API_KEY ("EMPTY" where none is set, as vLLM wants no key) and appears
nowhere else. Of the openai client only the transport is used, over aiohttp: building typed requests and responses would
cost more than half of the time that a call takes here, and with many rollouts at once this process is the bottleneck.
"""

import asyncio
import contextlib
import email.utils
import json
import os
import random
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import openai

from tasks import config
from tasks.agent.completion import Complete, Completion, CompletionError, OpenConversation, ToolCall
from tasks.agent.context import TokenCount, text_alone
from tasks.agent.fleet import Member, open_fleet
from tasks.agent.message import PLACEHOLDER, Image, images_of, openai_content
from tasks.agent.protocol import clean
from tasks.agent.sampling import ResolvedSampling
from tasks.errors import ConfigError, ServerError
from tasks.logs import run_logger
from tasks.secrets import quoted, without_values
from tasks.server_api import context_length

_FIRST_DELAY_S, _LONGEST_DELAY_S, _LONGEST_RETRY_AFTER_S = 0.5, 30.0, 120.0
_MOST_TOKENS = 10**8
_TOKENIZE_S = 30.0
_ASK_AGAIN_S = 5.0
_EVERY_TOKEN = {"top_k": -1, "min_p": 0.0}  # any may be drawn, see tasks/agent/sampling.py
# request fields that are vLLM's own, not OpenAI's
_EXTENSIONS = frozenset({"structured_outputs", "include_stop_str_in_output", *_EVERY_TOKEN, "repetition_penalty"})
_CAN_PASS = frozenset({408, 409, 429})  # and every 5xx
# how vLLM says that a conversation is too long, or has more images than it takes
_TOO_LONG = re.compile(
    r"context length|longer than the maximum model length|may be provided in one prompt", re.IGNORECASE
)

ImageUrl = Callable[[Image], Awaitable[bytes]]
"""Image → the address that a server gets it by, in ASCII."""


@contextlib.asynccontextmanager
async def open_client(server: config.Server, image_url: ImageUrl | None = None) -> AsyncIterator[OpenConversation]:
    """A function that opens conversations with `server.model`, for as long as the block runs; connections are shared.

    What is longer than the model's context, as the settings or else the server tell it, is not sent: the call raises
    CompletionError with `out_of_context`.

    Args:
        image_url: needed where messages have images, see `images.PageImages.url`.

    All calls of a conversation go to one server, whose prefix cache holds the turns before: the one with the fewest calls
    in flight when the conversation begins. After a call that failed it goes on at another server, if one is well.

    A call makes at most 1 + `max_retries` tries, each of which asks every server that is well at most once and for at most
    `request_timeout` seconds. Between tries it waits as long as the server says in Retry-After, else an exponential backoff
    with full jitter. It raises CompletionError when the last try failed, or at once after a status that no other try will mend.
    """
    async with contextlib.AsyncExitStack() as stack:
        clients = {url: await stack.enter_async_context(_connected(url, server.concurrency)) for url in server.base_url}
        fleet = await stack.enter_async_context(open_fleet(clients, server.model))
        context = await stack.enter_async_context(_open_context(server))

        def conversation() -> Complete:
            at: Member | None = None
            count = TokenCount(server.image_token_side)

            async def complete(
                messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any], sampling: ResolvedSampling, seed: int
            ) -> Completion:
                nonlocal at
                if context.tokens:
                    room = context.tokens - sampling.max_tokens
                    counts = fleet.choose(at, []).client if server.extensions else None
                    await _refuse_too_long(messages, options.get("tools"), count, room, counts)
                body = _body(server.model, messages, options, sampling, seed, server.extensions)
                content = await _content(body, messages, image_url)
                start = time.perf_counter()
                for tries in range(server.max_retries + 1):
                    asked: list[Member] = []
                    while True:
                        at = fleet.choose(at, asked)
                        at.in_flight += 1
                        try:
                            data = await _ask(at.client, content, server.request_timeout)
                            completion = _completion(data, time.perf_counter() - start)
                            count.learn(messages, completion.prompt_tokens, completion.completion_tokens)
                            return completion
                        except _TryError as error:
                            failed = error
                        finally:
                            at.in_flight -= 1
                        asked.append(at)
                        if failed.can_pass:
                            fleet.leave_out(at)
                        if not failed.can_pass or not fleet.has_other(asked):
                            break
                    if not failed.can_pass or tries == server.max_retries:
                        failed.final.detail += f" (try {tries + 1})" if tries else ""
                        raise failed.final from failed.__cause__
                    await asyncio.sleep(_delay(tries, failed.retry_after))
                raise AssertionError("the last try returns or raises")

            return complete

        yield conversation


def _connected(base_url: str, concurrency: int) -> openai.AsyncOpenAI:
    """A client of one server. Every rollout may come to be there, so it may have as many connections as there are."""
    import httpx2  # the openai client's own transport library

    connections = concurrency + 8
    limits = httpx2.Limits(max_connections=connections, max_keepalive_connections=connections)
    return openai.AsyncOpenAI(
        base_url=base_url,
        api_key=os.environ.get("OPENAI_API_KEY", "").strip() or "EMPTY",
        max_retries=0,
        http_client=openai.DefaultAioHttpClient(limits=limits, timeout=None),
    )


class _TryError(Exception):
    """One try failed: what to raise if it was the last, whether another can help, and after how long."""

    def __init__(self, final: CompletionError, *, can_pass: bool, retry_after: float | None = None) -> None:
        self.final, self.can_pass, self.retry_after = final, can_pass, retry_after


@dataclass
class _Context:
    """How long a request and its answer may be together: the shortest context of the servers that say theirs."""

    tokens: int | None

    async def silent(self, base_urls: Sequence[str]) -> list[str]:
        """Ask servers for theirs, all at once; returns those that did not answer."""
        asked = (asyncio.to_thread(context_length, base_url) for base_url in base_urls)
        left = []
        for base_url, said in zip(base_urls, await asyncio.gather(*asked, return_exceptions=True), strict=True):
            if isinstance(said, ServerError):
                run_logger().debug("the length of the model's context is not known: %s", said)
                left.append(base_url)
            elif isinstance(said, BaseException):
                raise said
            else:
                self.tokens = min((tokens for tokens in (self.tokens, said) if tokens), default=None)
        return left

    async def ask_again(self, base_urls: Sequence[str]) -> None:
        """Ask until all have answered. What a server refuses meanwhile as too long is made shorter all the same."""
        while base_urls:
            await asyncio.sleep(_ASK_AGAIN_S)
            base_urls = await self.silent(base_urls)


@contextlib.asynccontextmanager
async def _open_context(server: config.Server) -> AsyncIterator[_Context]:
    """The context's length as the settings say, else as the servers do, which are asked until they answer."""
    context = _Context(server.context_length)
    silent = [] if context.tokens else await context.silent(server.base_url)
    if silent:
        run_logger().warning("the length of the model's context is not known until %s answers", ", ".join(silent))
    asking = asyncio.create_task(context.ask_again(silent))
    try:
        yield context
    finally:
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)


async def _refuse_too_long(
    messages: Sequence[Mapping[str, Any]],
    tools: object,
    count: TokenCount,
    room: int,
    client: openai.AsyncOpenAI | None,
) -> None:
    """Raise CompletionError when the messages have more tokens than there is room for.

    Args:
        client: of a server that can tokenize, if there is one.
    """
    if count.at_most(messages, tools) <= room:
        return
    tokens = None if client is None else await _tokens(client, messages, tools)
    if tokens is None:
        tokens = count.about(messages, tools)
    else:
        tokens += count.images(messages)
        count.learn(messages, tokens)
    if tokens > room:
        detail = f"not sent: it has {tokens} tokens, and beside the answer's the model's context has room for {room}"
        raise CompletionError("http_status", detail, out_of_context=True)


async def _tokens(client: openai.AsyncOpenAI, messages: Sequence[Mapping[str, Any]], tools: object) -> int | None:
    """Tokens of the messages without their images, as vLLM counts them; None where the server does not."""
    url = f"{str(client.base_url).rstrip('/').removesuffix('/v1')}/tokenize"
    body = {"messages": text_alone(messages)} | ({"tools": tools} if tools else {})
    try:
        async with asyncio.timeout(_TOKENIZE_S):
            return _count(json.loads(await client.post(url, cast_to=str, content=_dumped(body)))["count"])
    except (TimeoutError, openai.OpenAIError, ValueError, LookupError, TypeError):
        return None  # it is no vLLM, or is gone, which the request itself will show


async def _content(body: Mapping[str, Any], messages: Sequence[Mapping[str, Any]], image_url: ImageUrl | None) -> bytes:
    """The request's bytes. Images are put into the JSON as they are kept, which no text of it can be taken for."""
    images = [image for message in messages for image in images_of(message)]
    if not images:
        return _dumped(body)
    if image_url is None:
        raise ConfigError("the conversation shows page images, and this client was not told how to send them")
    urls = iter(await asyncio.gather(*map(image_url, images)))
    texts = _dumped(body).split(PLACEHOLDER.encode())
    parts = [texts[0]]
    for text in texts[1:]:
        parts += next(urls), text
    return b"".join(parts)


def _dumped(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()


async def _ask(client: openai.AsyncOpenAI, content: bytes, timeout_s: float) -> str:
    try:
        async with asyncio.timeout(timeout_s):
            return without_values(await client.post("/chat/completions", cast_to=str, content=content))
    except TimeoutError as error:
        raise _TryError(CompletionError("deadline", f"no answer within {timeout_s:g} s"), can_pass=True) from error
    except openai.APIConnectionError as error:  # also a refused connection that the transport calls a timeout
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        detail = quoted(f"{type(cause).__name__}: {cause}", 500)
        raise _TryError(CompletionError("connection", detail), can_pass=True) from error
    except openai.APIStatusError as error:
        raise _refused(error) from error


def _refused(error: openai.APIStatusError) -> _TryError:
    """A status as a failure: what a later try can mend is the server's, the rest is the request's."""
    status = error.status_code
    detail = quoted(f"HTTP {status}: {error.response.text}", 500)
    if status in _CAN_PASS or status >= 500:
        after = _retry_after(error.response.headers.get("retry-after"))
        return _TryError(CompletionError("server_error", detail), can_pass=True, retry_after=after)
    too_long = status == 400 and _TOO_LONG.search(detail) is not None
    final = CompletionError("http_status", detail, out_of_context=too_long, refused=status == 400 and not too_long)
    return _TryError(final, can_pass=False)


def _retry_after(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks to wait: a number or a date (RFC 9110, 10.2.3); None when neither."""
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return min(max(0.0, seconds), _LONGEST_RETRY_AFTER_S) if seconds == seconds else None


def _delay(tries: int, retry_after: float | None) -> float:
    """Seconds until the next try: exponential backoff with full jitter, so that rollouts do not come back all at once."""
    jitter = random.uniform(0, min(_LONGEST_DELAY_S, _FIRST_DELAY_S * 2**tries))
    return jitter if retry_after is None else retry_after + min(jitter, _FIRST_DELAY_S)


def _body(
    model: str,
    messages: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
    sampling: ResolvedSampling,
    seed: int,
    extensions: bool,
) -> dict[str, Any]:
    body = {
        "model": model,
        "messages": [_sent(message) for message in messages],
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_tokens,
        "repetition_penalty": sampling.repetition_penalty,
        **_EVERY_TOKEN,
        "seed": seed,
        **options,
    }
    return body if extensions else {name: value for name, value in body.items() if name not in _EXTENSIONS}


def _sent(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as it goes over the wire, a placeholder in place of each image's address."""
    rest = {name: value for name, value in message.items() if name != "images"}
    return rest | {"content": openai_content(message, lambda image: PLACEHOLDER)}


def _completion(data: str, latency_s: float) -> Completion:
    """The first choice of a response body."""
    try:
        body = json.loads(data)
        choice, usage = body["choices"][0], body.get("usage") or {}
        message = choice["message"]
        calls = tuple(
            ToolCall(clean(str(c["id"])), str(c["function"]["name"]), str(c["function"]["arguments"]))
            for c in message.get("tool_calls") or ()
        )
        reasoning = message.get("reasoning") or message.get("reasoning_content")
        finish_reason = choice.get("finish_reason")
        return Completion(
            raw_text=clean(message.get("content") or ""),
            reasoning=clean(reasoning) if reasoning else None,
            tool_calls=calls,
            finish_reason=None if finish_reason is None else clean(str(finish_reason)),
            prompt_tokens=_count(usage.get("prompt_tokens")),
            completion_tokens=_count(usage.get("completion_tokens")),
            latency_s=latency_s,
        )
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        final = CompletionError("server_error", f"the answer is no completion: {quoted(clean(data), 400)}")
        raise _TryError(final, can_pass=True) from error


def _count(value: object) -> int | None:
    """A number of tokens; None for what cannot be one, as no odd answer may make a rollout that cannot be stored."""
    return value if isinstance(value, int) and 0 <= value <= _MOST_TOKENS else None
