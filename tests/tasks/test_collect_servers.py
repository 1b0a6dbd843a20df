"""Collection over several servers: the load is shared, and when one dies nothing is lost and nothing is done twice."""

from collections import Counter
from typing import Any

import pytest

from tasks import artifact, collect, storage
from tests.model_server import Die, ModelServer, Status, dutiful_agent
from tests.tasks.test_collect_faults import CONCURRENCY, QUESTIONS, _collect, _folded, _inputs, _outcomes

ROLLOUTS = 2 * QUESTIONS


@pytest.fixture
def local(tmp_path: Any) -> tuple[str, dict[str, artifact.Artifact]]:
    return str(tmp_path), _inputs(str(tmp_path))


def _answered(server: ModelServer) -> list[int]:
    """Seeds of the rollouts that a server was asked to end."""
    return [r["seed"] for r in server.requests if r["messages"][-1]["role"] == "tool"]


async def test_servers_share_a_collection_and_each_rollout_stays_at_one(local: Any) -> None:
    root, inputs = local
    with ModelServer(delay_s=0.05) as a, ModelServer(delay_s=0.05) as b:
        await _collect(root, inputs, [a.url, b.url])
    assert _outcomes(_folded(root, inputs)) == {"answered": ROLLOUTS}
    seeds = [{r["seed"] for r in server.requests} for server in (a, b)]
    assert not seeds[0] & seeds[1]
    assert all(server.most_in_flight <= CONCURRENCY / 2 for server in (a, b))
    assert a.calls + b.calls == 2 * ROLLOUTS


@pytest.mark.parametrize("fault", [Die(), Status(500)], ids=lambda fault: type(fault).__name__)
async def test_one_of_three_dies_and_the_others_do_all_of_it_once(local: Any, fault: Die | Status) -> None:
    root, inputs = local
    with ModelServer() as dying, ModelServer() as b, ModelServer() as c:

        def script(request: dict[str, Any], call: int) -> Any:
            if call > 8:
                dying.ill = Status(503)
                return fault
            return dutiful_agent(request, call)

        dying.script = script
        reports = await _collect(root, inputs, [dying.url, b.url, c.url], max_retries=0)
    assert [r.failed for r in reports] == [{}, {}, {}]
    rows = _folded(root, inputs)
    assert _outcomes(rows) == {"answered": ROLLOUTS}
    assert {r["attempt"] for r in rows} == {1}
    stored = artifact.read_parts(storage.join(root, "run"), collect.SCHEMA, ["rollout_id"])
    assert stored.num_rows == ROLLOUTS
    ended = Counter(seed for server in (b, c) for seed in _answered(server))
    assert set(ended.values()) == {1}
    assert set(ended) | set(_answered(dying)) == {r["seed"] for r in rows}


async def test_while_all_are_gone_rollouts_end_at_once_and_are_done_when_one_is_back(local: Any) -> None:
    root, inputs = local
    with ModelServer(lambda request, call: Die()) as a, ModelServer(lambda request, call: Die()) as b:
        await _collect(root, inputs, [a.url, b.url], max_retries=0)
    lost = _folded(root, inputs)
    assert _outcomes(lost) == {"connection": ROLLOUTS}
    assert sum("not tried" in r["failure_detail"] for r in lost) >= ROLLOUTS - 3 * CONCURRENCY
    with ModelServer() as well:
        await _collect(root, inputs, [a.url, well.url])
    assert _outcomes(_folded(root, inputs)) == {"answered": ROLLOUTS}
