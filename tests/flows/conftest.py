"""A real Prefect server for the flow tests: one for the session, with a database of its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.testing.utilities import prefect_test_harness

from flows.embedded import server_process, using
from tests.small_collection import write_documents


@pytest.fixture(scope="session", autouse=True)
def prefect() -> Iterator[None]:
    """Flows run against this server; results go where each test's storage root is."""
    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture(scope="session")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pdfs/ and questions.jsonl."""
    return write_documents(tmp_path_factory.mktemp("documents"))


@pytest.fixture(scope="module")
def whole_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a server for one module, with the services that the session's lacks: schedules, automations, leases.

    The environment names it, for this and all child processes.
    """
    with (
        server_process(tmp_path_factory.mktemp("prefect")) as url,
        using(url),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("PREFECT_API_URL", url)
        yield url
