"""The client against a real server: what it sends, what it reads, what it tries again and what not."""

import asyncio
import time
from typing import Any

import pytest

from tasks import config
from tasks.agent import client as module
from tasks.agent.client import open_client
from tasks.agent.completion import Completion, CompletionError
from tasks.agent.sampling import resolve
from tests.model_server import Drop, Hang, ModelServer, Reply, Script, Status

MESSAGES = [{"role": "user", "content": "Frage: où?"}]


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(module, "_FIRST_DELAY_S", 0.01)


async def ask(url: str, retries: int = 2, timeout: float = 10.0, name: config.SamplingName = "default") -> Completion:
    server = config.Server(base_url=url, model="base", max_retries=retries, request_timeout=timeout)
    async with open_client(server) as conversation:
        return await conversation()(MESSAGES, {"stop": ["</search>"]}, resolve(name, config.Sampling(max_tokens=9)), 5)


async def test_a_server_that_is_not_vllm_gets_openais_fields_alone() -> None:
    of_vllm = {"structured_outputs": {"regex": "x"}, "include_stop_str_in_output": True}

    def strict(request: dict[str, Any], call: int) -> Reply | Status:
        return Status(400) if {*of_vllm, "repetition_penalty", "top_k", "min_p"} & request.keys() else Reply("ja")

    with ModelServer(strict) as server:
        asked = config.Server(base_url=server.url, model="base", extensions=False)
        async with open_client(asked) as conversation:
            options = {"stop": ["</search>"], **of_vllm}
            completion = await conversation()(MESSAGES, options, resolve("diverse", config.Sampling()), 5)
        assert completion.raw_text == "ja"
        with pytest.raises(CompletionError):
            await ask(server.url, name="diverse")


async def failure(script: Script, retries: int = 2, timeout: float = 10.0) -> tuple[CompletionError, int]:
    with ModelServer(script) as server, pytest.raises(CompletionError) as caught:
        await ask(server.url, retries, timeout)
    return caught.value, server.calls


def replies(*actions: object) -> Script:
    """Each call gets the next action, later ones the last."""
    return lambda request, call: actions[min(call, len(actions)) - 1]  # type: ignore[return-value]


async def test_request_and_reply() -> None:
    reply = Reply("ja", reasoning="weil", tool_calls=[("search_documents", '{"query": "x"}')])
    with ModelServer(replies(reply)) as server:
        completion = await ask(server.url, name="diverse")
    assert server.requests == [
        {
            "model": "base",
            "messages": MESSAGES,
            "temperature": 0.9,
            "top_p": 0.98,
            "repetition_penalty": 1.1,
            "top_k": -1,  # as min_p: any token, whatever the model's own generation settings say
            "min_p": 0.0,
            "max_tokens": 9,
            "seed": 5,
            "stop": ["</search>"],
        }
    ]
    assert (completion.raw_text, completion.reasoning, completion.finish_reason) == ("ja", "weil", "stop")
    assert [(c.name, c.arguments) for c in completion.tool_calls] == [("search_documents", '{"query": "x"}')]
    assert completion.prompt_tokens
    assert completion.latency_s > 0


async def test_what_the_model_says_is_left_as_it_is_but_for_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "vllm-key-0123456789")
    said = "https://www.acme.com\nsales@acme.com, Signature=none, //me:you@host, "
    with ModelServer(replies(Reply(f"{said}vllm-key-0123456789"))) as server:
        completion = await ask(server.url)
    assert completion.raw_text == f"{said}[OPENAI_API_KEY]"


async def test_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with ModelServer() as server:
        await ask(server.url)
        monkeypatch.setenv("OPENAI_API_KEY", "sk-geheim")
        await ask(server.url)
    assert [headers["Authorization"] for headers in server.headers] == ["Bearer EMPTY", "Bearer sk-geheim"]


@pytest.mark.parametrize("fault", [Status(503), Status(429), Status(408), Status(409), Status(500), Drop()])
async def test_what_can_pass_is_tried_again(fault: Status | Drop) -> None:
    with ModelServer(replies(fault, fault, Reply("ja"))) as server:
        completion = await ask(server.url)
    assert (completion.raw_text, server.calls) == ("ja", 3)


@pytest.mark.parametrize(
    "body", ["", "not json", "[]", '{"choices": []}', '{"choices": [{"message": null}]}', '{"choices": null}']
)
async def test_an_answer_that_is_none_is_tried_again(body: str) -> None:
    with ModelServer(replies(Status(200, body), Reply("ja"))) as server:
        assert (await ask(server.url)).raw_text == "ja"
    error, calls = await failure(replies(Status(200, body)))
    assert (error.failure, calls) == ("server_error", 3)


async def test_every_try_fails() -> None:
    for action, kind in [(Status(503, "busy"), "server_error"), (Drop(), "connection")]:
        error, calls = await failure(replies(action))
        assert (error.failure, calls) == (kind, 3)
        assert "try 3" in error.detail
    error, calls = await failure(replies(Hang()), retries=1, timeout=1.0)
    assert (error.failure, calls) == ("deadline", 2)


@pytest.mark.parametrize("code", [400, 401, 403, 404, 422])
async def test_what_cannot_pass_is_not_tried_again(code: int) -> None:
    error, calls = await failure(replies(Status(code, "no such thing")))
    assert (error.failure, calls, error.out_of_context) == ("http_status", 1, False)
    assert "no such thing" in error.detail


async def test_too_long_a_conversation_is_told_apart() -> None:
    body = '{"error": {"message": "This model\'s maximum context length is 4096 tokens."}}'
    error, calls = await failure(replies(Status(400, body)))
    assert (error.out_of_context, calls) == (True, 1)


async def test_a_server_that_was_silent_at_first_is_asked_again_for_its_context(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_ASK_AGAIN_S", 0.01)
    silent, server = True, ModelServer(replies(Reply("ja")))
    of_server = module.context_length

    def asked(base_url: str) -> int | None:
        return of_server("http://127.0.0.1:9/v1" if silent else base_url)  # where nobody listens

    monkeypatch.setattr(module, "context_length", asked)
    server.max_model_len = 600
    long = [{"role": "user", "content": "word " * 2000}]
    sampling = resolve("default", config.Sampling(max_tokens=9))
    with server:
        settings = config.Server(base_url=server.url, model="base", max_retries=0)
        async with open_client(settings) as conversation:
            with pytest.raises(CompletionError) as refused:
                await conversation()(long, {}, sampling, 5)
            assert (refused.value.out_of_context, server.refused) == (True, 1)  # the server has said so
            silent = False
            async with asyncio.timeout(60):
                while server.asked_for_models == 0:
                    await asyncio.sleep(0.01)
                while "not sent" not in refused.value.detail:
                    with pytest.raises(CompletionError) as refused:
                        await conversation()(long, {}, sampling, 5)
    assert refused.value.out_of_context


async def test_nobody_listens() -> None:
    with ModelServer() as server:
        url = server.url
    with pytest.raises(CompletionError) as caught:
        await ask(url, retries=1)
    assert caught.value.failure == "connection"


async def test_retry_after_is_kept() -> None:
    with ModelServer(replies(Status(429, headers={"Retry-After": "0.4"}), Reply("ja"))) as server:
        start = time.monotonic()
        await ask(server.url)
        assert time.monotonic() - start >= 0.4


def test_retry_after_forms() -> None:
    assert module._retry_after(None) is None
    assert module._retry_after("soon") is None
    assert module._retry_after("nan") is None
    assert module._retry_after("7") == 7
    assert module._retry_after("-7") == 0
    assert module._retry_after("9999999") == module._LONGEST_RETRY_AFTER_S
    assert module._retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0


def test_backoff_grows_to_a_bound_and_is_jittered() -> None:
    for tries in range(20):
        delays = [module._delay(tries, None) for _ in range(50)]
        assert 0 <= min(delays) <= max(delays) <= min(module._LONGEST_DELAY_S, module._FIRST_DELAY_S * 2**tries)
        assert len(set(delays)) > 1
    assert 3 <= module._delay(5, 3.0) <= 3 + module._FIRST_DELAY_S


async def test_connections_suffice_for_all_at_once() -> None:
    with ModelServer(replies(Hang())) as server:
        settings = config.Server(base_url=server.url, model="base", concurrency=150)
        async with open_client(settings) as conversation:
            complete = conversation()
            sampling = resolve("greedy", config.Sampling())
            asking = [asyncio.ensure_future(complete(MESSAGES, {}, sampling, n)) for n in range(150)]
            async with asyncio.timeout(60):
                while server.in_flight < 150:  # none is answered, so each must have a connection of its own
                    await asyncio.sleep(0.01)
            for task in asking:
                task.cancel()
            ended = await asyncio.gather(*asking, return_exceptions=True)
    assert all(isinstance(end, asyncio.CancelledError) for end in ended)
