"""Where a model comes from: a folder, the hub, else the package that carries it; and what is said when it is nowhere."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.errors import ConfigError
from tasks.model import DEMO_MODEL, described, fetch_model
from tests.tiny_model import tiny_model

ASK = "import sys; from tasks.model import fetch_model; print(fetch_model(sys.argv[1]))"


def fetched(name: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`fetch_model` in a process of its own, as libraries read some of these variables only once."""
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", ASK, name], env=env, capture_output=True, text=True, check=False)


def test_a_folder_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert fetch_model(str(folder)) == fetch_model("model") == folder.absolute()


@pytest.mark.parametrize("name", ["nobody/has-this", "/no/such/folder", "./neither", "not a name!"])
def test_what_is_nowhere_is_told_as_such(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # a proxy that lets nobody through
    monkeypatch.setenv("DRAG_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match=r"neither a folder with a config\.json nor to be had from the model hub"):
        fetch_model(name)


def test_where_no_hub_answers_the_demos_model_comes_from_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRAG_CACHE", str(tmp_path))
    assert described(DEMO_MODEL) == DEMO_MODEL
    made = fetched(
        DEMO_MODEL, HF_ENDPOINT="http://127.0.0.1:9", DRAG_CACHE=str(tmp_path), HF_HOME=str(tmp_path / "hub")
    )
    assert made.returncode == 0, made.stderr
    folder = Path(made.stdout.splitlines()[-1])
    assert folder.is_relative_to(tmp_path)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    # who reads figures of these weights is told of them
    assert described(DEMO_MODEL).startswith(f"{DEMO_MODEL} (weights of 4 bits")
    assert described(str(tmp_path)) == str(tmp_path)
