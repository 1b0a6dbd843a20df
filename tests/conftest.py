"""Fixtures for every test: an S3 server on a socket, and a storage root on each kind of storage."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer

from tasks import storage

_S3_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Address of an S3 server on a free local port, which the environment names for this and all child processes."""
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith("AWS_")]:
            patch.delenv(name)  # a developer's own profile or session token must not reach the tests
        for name, value in {**_S3_ENVIRONMENT, "AWS_ENDPOINT_URL": url}.items():
            patch.setenv(name, value)
        storage._client.cache_clear()
        yield url
    storage._client.cache_clear()
    server.stop()


@pytest.fixture(params=["local", "s3"])
def storage_root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty storage root: a local folder, and a prefix of a bucket of its own on the S3 server."""
    if request.param == "local":
        return str(tmp_path / "storage")
    request.getfixturevalue("s3_server")
    bucket = f"drag-{uuid.uuid4().hex}"
    storage._client().create_bucket(Bucket=bucket)
    return f"s3://{bucket}/some/prefix"
