"""Real servers for tests: PostgreSQL and Redis of Debian, SeaweedFS of a Python package, and Prefect on the first two.

Each listens on loopback, on ports of its own, keeps its data in a folder of its own, and ends with the test session, also when
that is killed. Which programs, options and settings is not said here but in infra/compose.yaml and infra/images/Dockerfile,
which are read as Docker Compose reads them: what is tested is what is deployed.
"""

import contextlib
import functools
import json
import os
import pwd
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import httpx
import pytest

from tasks import watchdog
from tasks.logs import log_tail
from tasks.network import free_port

ROOT = Path(__file__).parents[1]
COMPOSE, DOCKERFILE = ROOT / "infra/compose.yaml", ROOT / "infra/images/Dockerfile"
SECRETS = {
    "POSTGRES_PASSWORD": "postgres-secret",
    "PREFECT_AUTH": "admin:prefect-secret",
    "AWS_ACCESS_KEY_ID": "s3-key-id",
    "AWS_SECRET_ACCESS_KEY": "s3-secret",
    "OPENAI_API_KEY": "vllm-secret",
}
_BIN = Path(sys.prefix) / "bin"
_START_TIMEOUT_S = 300  # never waited for unless something is broken: a busy machine may be slow


@dataclass(frozen=True)
class Prefect:
    """A Prefect server with its services. `environment` is what a client or worker needs to talk to it, and to S3."""

    api_url: str
    environment: dict[str, str]
    folder: Path

    def request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Ask the server's API; the answer's JSON, if it has any."""
        user, _, password = SECRETS["PREFECT_AUTH"].partition(":")
        reply = httpx.request(method, self.api_url + path, json=body, auth=(user, password), timeout=60)
        assert reply.is_success, f"{path}: {reply.text}"
        return reply.json() if reply.content else None


def missing(program: str, package: str) -> NoReturn:
    """Skip the test for want of a program; where everything must be there, as in CI, fail it."""
    reason = f"{program} is not installed: `make packages`, or install {package}"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def compose_command(*words: str) -> list[str]:
    """Docker Compose on infra/compose.yaml, with all its profiles."""
    return [str(_BIN / "docker-compose"), "--file", str(COMPOSE), "--profile", "*", *words]


@functools.cache
def composed() -> dict[str, Any]:
    """infra/compose.yaml as Docker Compose understands it, with SECRETS filled in. It needs no engine."""
    command, env = compose_command("config", "--format", "json"), {"PATH": os.environ["PATH"], **SECRETS}
    return json.loads(subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout)


def service(name: str) -> dict[str, Any]:
    """One service of the compose file."""
    return composed()["services"][name]


def s3_keys() -> tuple[str, str]:
    """Key pair of the compose file's S3 server: id, secret."""
    given = service("s3")["environment"]
    return given["AWS_ACCESS_KEY_ID"], given["AWS_SECRET_ACCESS_KEY"]


def worker_command(pool: str) -> list[str]:
    """What the image of a work pool starts when it is given no command."""
    commands = [json.loads(line) for line in re.findall(r"^CMD (\[.*\])$", DOCKERFILE.read_text(), re.MULTILINE)]
    (command,) = (c for c in commands if c[c.index("--pool") + 1] == pool)
    return command


def image_environment(target: str, cache: Path) -> dict[str, str]:
    """The variables that an image sets, with `cache` for the folder that its user may write."""
    stage = DOCKERFILE.read_text().split(f" AS {target}\n")[1].split("\nFROM ")[0].replace("\\\n", " ")
    words = [word for line in re.findall(r"^ENV (.*)$", stage, re.MULTILINE) for word in shlex.split(line)]
    return {name: value.replace("/var/cache/drag", str(cache)) for name, _, value in (w.partition("=") for w in words)}


@contextlib.contextmanager
def running(
    command: Sequence[str], log: Path, env: Mapping[str, str], ready: Callable[[], bool], folder: Path | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A program for the length of the block, once `ready` says so; it ends with this process, however that ends."""
    with log.open("wb") as output:
        process = watchdog.start(command, env={**env, "PYTHONPATH": str(ROOT)}, output=output)
    try:
        started = time.monotonic()
        while not ready():
            if process.poll() is not None or time.monotonic() - started > _START_TIMEOUT_S:
                pytest.fail(f"{' '.join(command)} did not start:\n{log_tail(log)}")
            time.sleep(0.1)
        yield process
    finally:
        watchdog.stop(process)


def answers(url: str) -> bool:
    """Whether something answers an HTTP request at `url` with success."""
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return reply.status == 200
    except (urllib.error.URLError, OSError):
        return False


def _postgres_program(name: str) -> str:
    """The newest of a program that Debian puts in no PATH."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: int(p.parent.name))
    found = shutil.which(name, path=os.pathsep.join([*map(str, reversed(folders)), os.environ["PATH"]]))
    return found or missing(name, "postgresql")


@contextlib.contextmanager
def postgres() -> Iterator[int]:
    """Yields the port of a PostgreSQL with the user, the database and the password that the compose file gives it."""
    initdb, server = _postgres_program("initdb"), _postgres_program("postgres")
    createdb, pg_isready = _postgres_program("createdb"), _postgres_program("pg_isready")
    given, port = service("postgres")["environment"], str(free_port())
    user, database = given["POSTGRES_USER"], given["POSTGRES_DB"]
    # PostgreSQL refuses to run as root, and pytest's folders are closed to other users.
    owner = pwd.getpwnam("postgres" if any(u.pw_name == "postgres" for u in pwd.getpwall()) else "nobody")
    root = os.geteuid() == 0
    as_owner = ["setpriv", f"--reuid={owner.pw_uid}", f"--regid={owner.pw_gid}", "--clear-groups"] if root else []
    env = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "PGPASSWORD": given["POSTGRES_PASSWORD"]}
    with tempfile.TemporaryDirectory(prefix="drag-postgres-") as name:
        folder, data = Path(name), Path(name) / "data"
        (folder / "password").write_text(given["POSTGRES_PASSWORD"])
        if root:
            for path in (folder, folder / "password"):
                shutil.chown(path, owner.pw_uid, owner.pw_gid)
        made = [initdb, "--pgdata", str(data), "--username", user, "--pwfile", str(folder / "password")]
        subprocess.run(
            [*as_owner, *made, "--auth=scram-sha-256", "--encoding=UTF8", "--no-sync"],
            check=True, env=env, capture_output=True, cwd=name,
        )  # fmt: skip
        options = [f"port={port}", "listen_addresses=127.0.0.1", "unix_socket_directories=", "fsync=off"]
        options += ["full_page_writes=off", "synchronous_commit=off"]
        command = [*as_owner, server, "-D", str(data), *(word for option in options for word in ("-c", option))]
        address = ["--host=127.0.0.1", f"--port={port}", f"--username={user}"]

        def ready() -> bool:
            return subprocess.run([pg_isready, *address], capture_output=True, check=False).returncode == 0

        with running(command, folder / "log", env, ready):
            subprocess.run([createdb, *address, database], check=True, env=env, capture_output=True)
            yield int(port)


@contextlib.contextmanager
def redis(folder: Path) -> Iterator[int]:
    """Yields the port of a Redis with the options that the compose file gives it."""
    program, *options = service("redis")["command"]
    found, port = shutil.which(program) or missing(program, "redis-server"), free_port()
    folder.mkdir()
    command = [found, *options, "--bind", "127.0.0.1", "--port", str(port), "--dir", str(folder)]
    cli = [shutil.which("redis-cli") or missing("redis-cli", "redis-tools"), "-p", str(port), "ping"]

    def ready() -> bool:
        return subprocess.run(cli, capture_output=True, check=False).stdout.strip() == b"PONG"

    with running(command, folder / "log", os.environ, ready):
        yield port


@contextlib.contextmanager
def seaweedfs(folder: Path) -> Iterator[str]:
    """Yields the address of the S3 server that the compose file starts, with the options it is given there."""
    program, *options = service("s3")["command"]
    parts = ("s3", "master", "volume", "filer", "admin")
    names = [name for part in parts for name in (f"{part}.port", f"{part}.port.grpc")]
    free: set[int] = set()
    while len(free) < len(names):
        free.add(free_port())
    ports = dict(zip(names, free, strict=True))
    folder.mkdir()
    command = [str(_BIN / "weed"), program, *(option for option in options if not option.startswith("-dir="))]
    command += [f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.volumeSizeLimitMB=64"]
    command += [f"-{name}={port}" for name, port in ports.items()]
    url = f"http://127.0.0.1:{ports['s3.port']}"
    with running(command, folder / "log", os.environ | service("s3")["environment"], lambda: answers(url + "/healthz")):
        yield url


@contextlib.contextmanager
def prefect(folder: Path) -> Iterator[Prefect]:
    """Yields Prefect as the compose file runs it: API and services apart, PostgreSQL, Redis, and an S3 server for runs."""
    folder.mkdir()
    with contextlib.ExitStack() as stack:
        database, messages = stack.enter_context(postgres()), stack.enter_context(redis(folder / "redis"))
        s3 = stack.enter_context(seaweedfs(folder / "s3"))
        port = free_port()
        api_url = f"http://127.0.0.1:{port}/api"
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "AWS_"))}
        ours |= {"PREFECT_HOME": str(folder / "home"), "DO_NOT_TRACK": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
        stores = {
            "PREFECT_SERVER_DATABASE_HOST": "127.0.0.1",
            "PREFECT_SERVER_DATABASE_PORT": str(database),
            "PREFECT_REDIS_MESSAGING_HOST": "127.0.0.1",
            "PREFECT_REDIS_MESSAGING_PORT": str(messages),
            "PREFECT_SERVER_DOCKET_URL": f"redis://127.0.0.1:{messages}/1",
            "PREFECT_SERVER_SERVICES_SCHEDULER_ENABLED": "false",  # as in tests/conftest.py
        }
        for name in ("server", "services"):
            command = [w if w != "0.0.0.0" else "127.0.0.1" for w in service(name)["command"]]
            if name == "server":
                command += ["--port", str(port)]
            env = ours | image_environment("orchestrator", folder / "cache") | service(name)["environment"] | stores
            ready = functools.partial(answers, api_url + "/ready") if name == "server" else lambda: True
            stack.enter_context(running([sys.executable, "-m", *command], folder / f"{name}.log", env, ready))
        env = ours | service("worker-cpu")["environment"] | {"PREFECT_API_URL": api_url, "AWS_ENDPOINT_URL": s3}
        bucket = service("bucket")
        made = [sys.executable, *bucket["command"][1:]]
        subprocess.run(made, env=ours | bucket["environment"] | {"AWS_ENDPOINT_URL": s3}, check=True)
        yield Prefect(api_url, env, folder)


@contextlib.contextmanager
def worker(server: Prefect, pool: str, machine: Path) -> Iterator[Path]:
    """A worker of a pool, as its image starts it, for the length of the block; its log, with those of its runs.

    Args:
        machine: folder that the worker has for itself, as its host's disk.
    """
    port, log = free_port(), machine / f"worker-{pool}.log"
    machine.mkdir(exist_ok=True)
    env = server.environment | {"PREFECT_WORKER_WEBSERVER_PORT": str(port), "PREFECT_WORKER_QUERY_SECONDS": "1"}
    env |= {"HOME": str(machine), "PREFECT_HOME": str(machine / "prefect"), "DRAG_CACHE": str(machine / "cache")}
    healthy = functools.partial(answers, f"http://127.0.0.1:{port}/health")
    with running([sys.executable, *worker_command(pool)[1:]], log, env, healthy):
        yield log
