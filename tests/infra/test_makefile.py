"""The Makefile says at once which Python it can use, before anything is downloaded for another."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from tests.servers import ROOT

REQUIRED = SpecifierSet(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"])
# This Python under another number. Of a Python that will do, the next thing asked is to make an environment.
OTHER = """#!/bin/sh
test "$1" = -c || {{ echo "asked for $*"; exit 3; }}
exec {python} -c 'import sys; sys.version_info = {version}; exec(sys.argv[1])' "$2"
"""


@pytest.mark.parametrize("folder", [".venv", ".venv-serve"])
@pytest.mark.parametrize("version", ["3.10", "3.11", "3.13", "3.14"])
def test_a_python_that_the_project_does_not_take_is_refused_before_anything_is_made(
    folder: str, version: str, tmp_path: Path
) -> None:
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "infra/serving", tmp_path / "infra/serving")
    python = tmp_path / "python"
    python.write_text(OTHER.format(python=sys.executable, version=tuple(map(int, version.split(".")))))
    python.chmod(0o755)
    command, env = ["make", f"PYTHON={python}", f"{folder}/.ready"], {"PATH": os.environ["PATH"]}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert (f"asked for -m venv {folder}" in done.stdout) == (version in REQUIRED)
    assert ("DRAG needs Python" in done.stderr) == (version not in REQUIRED)
