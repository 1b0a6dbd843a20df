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
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import openai

from tasks import config
from tasks.agent.completion import Complete, Completion, CompletionError, OpenConversation, ToolCall
from tasks.agent.fleet import Member, open_fleet
from tasks.agent.protocol import clean
from tasks.agent.sampling import ResolvedSampling
from tasks.secrets import quoted, without_secrets

_FIRST_DELAY_S, _LONGEST_DELAY_S, _LONGEST_RETRY_AFTER_S = 0.5, 30.0, 120.0
_MOST_TOKENS = 10**8
# request fields that are vLLM's own, not OpenAI's
_EXTENSIONS = frozenset({"structured_outputs", "include_stop_str_in_output", "repetition_penalty"})
_CAN_PASS = frozenset({408, 409, 429})  # and every 5xx


@contextlib.asynccontextmanager
async def open_client(server: config.Server) -> AsyncIterator[OpenConversation]:
    """A function that opens conversations with `server.model`, for as long as the block runs; connections are shared.

    All calls of a conversation go to one server, whose prefix cache holds the turns before: the one with the fewest calls
    in flight when the conversation begins. After a call that failed it goes on at another server, if one is well.

    A call makes at most 1 + `max_retries` tries, each of which asks every server that is well at most once and for at most
    `request_timeout` seconds. Between tries it waits as long as the server says in Retry-After, else an exponential backoff
    with full jitter. It raises CompletionError when the last try failed, or at once after a status that no other try will mend.
    """
    async with contextlib.AsyncExitStack() as stack:
        clients = {url: await stack.enter_async_context(_connected(url, server.concurrency)) for url in server.base_url}
        fleet = await stack.enter_async_context(open_fleet(clients, server.model))

        def conversation() -> Complete:
            at: Member | None = None

            async def complete(
                messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any], sampling: ResolvedSampling, seed: int
            ) -> Completion:
                nonlocal at
                body = _body(server.model, messages, options, sampling, seed, server.extensions)
                start = time.perf_counter()
                for tries in range(server.max_retries + 1):
                    asked: list[Member] = []
                    while True:
                        at = fleet.choose(at, asked)
                        at.in_flight += 1
                        try:
                            data = await _ask(at.client, body, server.request_timeout)
                            return _completion(data, time.perf_counter() - start)
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
        api_key=os.environ.get("OPENAI_API_KEY") or "EMPTY",
        max_retries=0,
        http_client=openai.DefaultAioHttpClient(limits=limits, timeout=None),
    )


class _TryError(Exception):
    """One try failed: what to raise if it was the last, whether another can help, and after how long."""

    def __init__(self, final: CompletionError, *, can_pass: bool, retry_after: float | None = None) -> None:
        self.final, self.can_pass, self.retry_after = final, can_pass, retry_after


async def _ask(client: openai.AsyncOpenAI, body: Mapping[str, Any], timeout_s: float) -> str:
    try:
        async with asyncio.timeout(timeout_s):
            return without_secrets(await client.post("/chat/completions", cast_to=str, body=body))
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
    too_long = status == 400 and "context length" in detail.lower()
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
        "messages": messages,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_tokens,
        "seed": seed,
        **options,
    }
    if sampling.repetition_penalty is not None:
        body["repetition_penalty"] = sampling.repetition_penalty
    return body if extensions else {name: value for name, value in body.items() if name not in _EXTENSIONS}


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
