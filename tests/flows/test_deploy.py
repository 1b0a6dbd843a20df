"""`drag deploy` against a Prefect server process of its own, with the services that schedule and notice."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows import deploy_files
from flows.deploy import deploy
from flows.embedded import server_process
from tasks import config

SECRETS = {
    "OPENAI_API_KEY": "sk-secret-of-the-model-server",
    "AWS_ACCESS_KEY_ID": "secret-access-key-id",
    "AWS_SECRET_ACCESS_KEY": "secret-access-key",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of the server's API, which the environment names for this and all child processes."""
    with (
        server_process(tmp_path_factory.mktemp("prefect")) as url,
        temporary_settings({PREFECT_API_URL: url}),
        pytest.MonkeyPatch.context() as patch,
    ):
        for spec in deploy_files.read_pools().blocks.values():
            patch.delenv(spec.variable, raising=False)
        for name, value in {**SECRETS, "PREFECT_API_URL": url}.items():
            patch.setenv(name, value)
        yield url


def state(url: str) -> dict[str, Any]:
    """All that the server says about what `drag deploy` makes, with times of change."""

    def listed(path: str) -> list[dict[str, Any]]:
        reply = httpx.post(f"{url}/{path}/filter", json={}, timeout=60)
        return sorted(reply.raise_for_status().json(), key=lambda item: item["id"])

    kinds = ["work_pools", "work_queues", "v2/concurrency_limits", "deployments", "automations"]
    kinds += ["block_documents", "block_types", "block_schemas", "flows"]
    return {kind: listed(kind) for kind in kinds}


def test_deploying_twice_changes_nothing(server: str, tmp_path: Path) -> None:
    settings = config.Deploy(storage=str(tmp_path))
    first = deploy(settings)
    assert {made.outcome for made in first} == {"created", "missing"}
    before = state(server)
    second = deploy(settings)
    assert {made.outcome for made in second} == {"unchanged", "missing"}, [m for m in second if m.outcome == "changed"]
    after = state(server)
    assert after == before
