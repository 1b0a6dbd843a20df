"""Fixtures for every test: S3 servers on sockets, a storage root on each kind of storage, Prefect as in production."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from moto.server import ThreadedMotoServer

from tasks import storage
from tests import servers

# Tiny models are fastest on one thread, here and in what tests start; those of several test processes would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A run that a test has not started itself would come between: nothing starts by the clock, not at one o'clock either.
os.environ["PREFECT_SERVER_SERVICES_SCHEDULER_ENABLED"] = "false"
# Timing decides no test: a machine may stall for longer than an example is usually allowed.
hypothesis.settings.register_profile("drag", parent=hypothesis.settings(), deadline=None)
hypothesis.settings.load_profile("drag")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--screenshots", metavar="FOLDER", help="where tests/flows/test_browser.py puts the README's pictures"
    )


@contextlib.contextmanager
def _s3_environment(url: str, key_id: str, secret: str) -> Iterator[str]:
    """The environment names this S3 server, for this and all child processes."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith("AWS_")]:
            patch.delenv(name)  # a developer's own profile or session token must not reach the tests
        patch.setenv("AWS_ENDPOINT_URL", url)
        patch.setenv("AWS_ACCESS_KEY_ID", key_id)
        patch.setenv("AWS_SECRET_ACCESS_KEY", secret)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        storage._client.cache_clear()
        yield url
    storage._client.cache_clear()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Address of moto's S3 server, which the environment names for the session."""
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with _s3_environment(f"http://{host}:{port}", "test", "test") as url:
        yield url
    server.stop()


@pytest.fixture(scope="session")
def seaweedfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of the S3 server of infra/compose.yaml, which has nothing in common with moto's but the protocol."""
    with servers.seaweedfs(tmp_path_factory.mktemp("seaweedfs") / "data") as url:
        yield url


@pytest.fixture
def s3_root(s3_server: str) -> str:
    """A prefix of a bucket of its own on moto's S3 server."""
    return _bucket()


@pytest.fixture(params=["local", "s3", "seaweedfs"])
def storage_root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty storage root: a local folder, and a prefix of a bucket of its own on each of two S3 servers."""
    if request.param == "local":
        yield str(tmp_path / "storage")
        return
    with contextlib.ExitStack() as stack:
        if request.param == "s3":
            request.getfixturevalue("s3_server")
        else:
            stack.enter_context(_s3_environment(request.getfixturevalue("seaweedfs"), *servers.s3_keys()))
        yield _bucket()


def _bucket() -> str:
    bucket = f"drag-{uuid.uuid4().hex}"
    storage._client().create_bucket(Bucket=bucket)
    return f"s3://{bucket}/some/prefix"


@pytest.fixture(scope="session")
def production(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.Prefect]:
    """A Prefect server on PostgreSQL with Redis messaging, and S3: what infra/compose.yaml composes, without its workers."""
    with servers.prefect(tmp_path_factory.mktemp("production") / "host") as server:
        yield server


@pytest.fixture
def production_root(production: servers.Prefect) -> Iterator[str]:
    """An empty storage root in the bucket that infra/compose.yaml makes, for this process and for the workers."""
    with _s3_environment(production.environment["AWS_ENDPOINT_URL"], *servers.s3_keys()):
        yield f"s3://{servers.service('bucket')['environment']['DRAG_BUCKET']}/{uuid.uuid4().hex}"
