"""Several servers behind one client: each call goes where the fewest are in flight, and none fails while one server is well."""

import asyncio
from collections import Counter
from typing import Any

import pytest

from tasks import config
from tasks.agent import client as client_module
from tasks.agent import fleet as fleet_module
from tasks.agent.client import open_client
from tasks.agent.completion import Complete, CompletionError
from tasks.agent.fleet import Fleet, Member
from tasks.agent.sampling import resolve
from tests.model_server import Die, Hang, ModelServer, Reply, Status, dutiful_agent

GREEDY = resolve("greedy", config.Sampling())


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_FIRST_DELAY_S", 0.01)
    monkeypatch.setattr(fleet_module, "_ASK_EVERY_S", 0.05)


def settings(*servers: ModelServer, **changes: Any) -> config.Server:
    return config.Server(base_url=[server.url for server in servers], model="base", **{"max_retries": 0} | changes)


async def ask(complete: Complete, text: str) -> str:
    return (await complete([{"role": "user", "content": text}], {}, GREEDY, 0)).raw_text


async def until(met: Any) -> None:
    async with asyncio.timeout(60):
        while not met():
            await asyncio.sleep(0.01)


async def test_calls_are_spread_evenly_and_a_conversation_stays_where_it_began() -> None:
    names = "abc"
    with ModelServer(keep=True) as a, ModelServer() as b, ModelServer() as c:
        servers = dict(zip(names, (a, b, c), strict=True))
        for name, server in servers.items():
            server.script = lambda request, call, name=name: Reply(name)
            server.delay_s = 0.2
        async with open_client(settings(a, b, c)) as conversation:
            open_ = [conversation() for _ in range(12)]
            first = await asyncio.gather(*(ask(complete, f"{n}") for n, complete in enumerate(open_)))
            assert Counter(first) == dict.fromkeys(names, 4)
            for _ in range(3):
                assert await asyncio.gather(*(ask(complete, "on") for complete in open_)) == first
    assert [server.calls for server in servers.values()] == [16, 16, 16]


async def test_a_slow_server_gets_less() -> None:
    gate = asyncio.Semaphore(8)
    with ModelServer() as fast, ModelServer(delay_s=0.5) as slow:
        async with open_client(settings(fast, slow)) as conversation:

            async def converse() -> None:
                async with gate:
                    complete = conversation()
                    for _ in range(2):
                        await ask(complete, "So?")

            await asyncio.gather(*(converse() for _ in range(100)))
    assert fast.calls + slow.calls == 200
    assert slow.calls < fast.calls / 2
    assert max(fast.most_in_flight, slow.most_in_flight) <= 8


@pytest.mark.parametrize("fault", [Die(), Status(503), Hang()], ids=lambda fault: type(fault).__name__)
async def test_a_call_that_one_server_fails_is_answered_by_another(fault: Die | Status | Hang) -> None:
    with ModelServer(lambda request, call: fault) as ill, ModelServer() as well:
        async with open_client(
            settings(ill, well, request_timeout=2.0 if isinstance(fault, Hang) else 60.0)
        ) as conversation:
            assert await ask(conversation(), "So?")
    assert (ill.calls, well.calls) == (1, 1)


async def test_a_server_that_is_gone_is_left_out_until_it_is_back() -> None:
    with ModelServer(lambda request, call: Die()) as goes, ModelServer() as stays:
        async with open_client(settings(goes, stays)) as conversation:
            for _ in range(20):
                await ask(conversation(), "So?")
            assert stays.calls == 20
            with ModelServer(port=goes.port) as back:
                await until(lambda: back.asked_for_models)
                while not back.calls:
                    await ask(conversation(), "So?")


async def test_a_server_that_comes_back_with_another_model_stays_out() -> None:
    with ModelServer() as other, ModelServer() as stays:
        other.script = lambda request, call: Status(500)
        other.models = ["another"]
        async with open_client(settings(other, stays)) as conversation:
            for _ in range(10):
                await ask(conversation(), "So?")
                await asyncio.sleep(0.02)
    assert (other.calls, stays.calls) == (1, 10)


async def test_with_all_gone_a_call_fails_as_with_one_and_the_last_word_is_kept() -> None:
    with ModelServer(lambda request, call: Status(503)) as a, ModelServer(lambda request, call: Status(500)) as b:
        async with open_client(settings(a, b, max_retries=1)) as conversation:
            with pytest.raises(CompletionError, match="HTTP 50") as caught:
                await ask(conversation(), "So?")
    assert caught.value.failure == "server_error"
    assert a.calls + b.calls >= 2


async def test_what_no_server_will_mend_is_asked_of_one_alone() -> None:
    with ModelServer(lambda request, call: Status(400)) as a, ModelServer(dutiful_agent) as b:
        async with open_client(settings(a, b)) as conversation:
            with pytest.raises(CompletionError, match="HTTP 400"):
                await ask(conversation(), "So?")
    assert (a.calls, b.calls) == (1, 0)


def test_the_choice() -> None:
    a, b, c = members = [Member(f"http://{name}/v1", client=None) for name in "abc"]  # type: ignore[arg-type]
    fleet = Fleet(members, "base")
    a.in_flight, b.in_flight, c.in_flight = 3, 1, 2
    assert fleet.choose(None, []) is b
    assert fleet.choose(a, []) is a, "a conversation stays, also at a busier server"
    assert fleet.choose(a, [a]) is b
    b.out = True
    assert fleet.choose(None, []) is c
    assert fleet.choose(b, []) is c, "a conversation leaves a server that is left out"
    a.out = c.out = True
    assert fleet.choose(None, []) is b, "with all left out, all are tried"
    assert not fleet.has_other([])
