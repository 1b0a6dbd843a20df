"""A real Prefect server for the flow tests: one for the session, with a database of its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.testing.utilities import prefect_test_harness

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
