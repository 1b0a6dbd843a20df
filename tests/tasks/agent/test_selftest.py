"""The self-test passes a model that searches, and shows what another one wrote."""

import pytest

from tasks import config
from tasks.agent.client import open_client
from tasks.agent.sampling import resolve
from tasks.agent.selftest import QUESTIONS, self_test
from tasks.errors import SelfTestError, ServerError
from tests.model_server import ModelServer, Reply, Script, Status, dutiful_agent


async def run(script: Script, **agent: object) -> list[str]:
    with ModelServer(script) as server:
        asked = config.Server(base_url=server.url, model="base", max_retries=0)
        async with open_client(asked) as conversation:
            sampling = resolve("greedy", config.Sampling())
            return await self_test(config.Agent.model_validate(agent), sampling, conversation())


@pytest.mark.parametrize("protocol", ["tags", "tools"])
async def test_a_model_that_searches_passes(protocol: str) -> None:
    assert len(await run(dutiful_agent, protocol=protocol)) == len(QUESTIONS)


async def test_one_search_is_enough() -> None:
    script = lambda request, call: Reply("<search>x</search>" if call == 3 else "Well.")  # noqa: E731
    assert await run(script, protocol="tags") == ["x"]


@pytest.mark.parametrize("examples", [False, True])
@pytest.mark.parametrize("protocol", ["tags", "tools"])
async def test_a_model_that_does_not_search_is_refused_with_what_it_wrote(protocol: str, examples: bool) -> None:
    with pytest.raises(SelfTestError, match="Sorry, what"):
        await run(lambda request, call: Reply("Sorry, what?"), protocol=protocol, examples=examples)


async def test_a_server_that_does_not_answer_is_another_error() -> None:
    with pytest.raises(ServerError, match="HTTP 503"):
        await run(lambda request, call: Status(503))
