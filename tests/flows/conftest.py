"""A real Prefect server for the flow tests: one for the session, with a database of its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.embedded import own_server, server_process, using
from tests.small_collection import write_documents


@pytest.fixture(scope="session", autouse=True)
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Flows run against this server, as those of the command line do; results go where each test's storage root is.

    Prefect's own harness waits without end, when the session is over, for what it could not tell its server.
    """
    with own_server(tmp_path_factory.mktemp("prefect")):
        yield


@pytest.fixture(scope="session")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pdfs/ and questions.jsonl."""
    return write_documents(tmp_path_factory.mktemp("documents"))


@pytest.fixture(scope="module")
def whole_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a server for one module alone, whose schedules, automations and leases no other test sees.

    The environment names it, for this and all child processes.
    """
    with (
        server_process(tmp_path_factory.mktemp("prefect")) as url,
        using(url),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("PREFECT_API_URL", url)
        yield url
