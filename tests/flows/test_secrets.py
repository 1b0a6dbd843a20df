"""Secrets stay where they are: the whole chain of flows runs with known ones, and all that it leaves is searched for them.

Also here: whom servers listen to, and that nothing in the code reads a pickle.
"""

import ast
import io
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest

from flows.embedded import server_process
from tasks import config, serve, storage
from tasks.secrets import without_secrets
from tests.listening import listening
from tests.model_server import ModelServer, Reply, Status
from tests.small_collection import searcher
from tests.tiny_model import tiny_model

SECRETS = {
    "OPENAI_API_KEY": "sk-openai-Zq7mVt3KxW",
    "AWS_ACCESS_KEY_ID": "AKIAZQ7MVT3KXWPL",
    "AWS_SECRET_ACCESS_KEY": "aws-secret-Rb9nYd2HcF",
    "DRAG_WEBHOOK_URL": "https://hooks.example.com/T0/webhook-Lp4sGj8QeU",
    "PREFECT_API_AUTH_STRING": "admin:prefect-Wk6xBn5TzM",
    "HF_TOKEN": "hf_Tn4wLs7YgPqEv",
}
PASSWORD = "url-password-Hv2cJr8NsD"
# what must not be found: of longer secrets the part that makes them one
NEEDLES = [value.rsplit("/", 1)[-1].rsplit(":", 1)[-1] for value in SECRETS.values()] + [PASSWORD]
ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Left:
    """All that the chain left behind: place → text."""

    texts: dict[str, str] = field(default_factory=dict)
    refused: list[tuple[int, str]] = field(default_factory=list)  # exit code and output of what had to be refused
    keys_sent: set[str] = field(default_factory=set)  # what the model server was given as Authorization


class Chain:
    """Commands and API calls against one Prefect server, with everything they say kept."""

    def __init__(self, url: str, root: str, environment: dict[str, str], left: Left) -> None:
        self.url, self.root, self.left = url, root, left
        self.environment = os.environ | environment | {"PREFECT_API_URL": url, "COLUMNS": "400"}
        self._numbers = itertools.count()

    def drag(self, *arguments: str, code: int = 0, **environment: str) -> None:
        command = [sys.executable, "-m", "flows.cli", *arguments, "--storage", self.root]
        self._run(command, self.environment | environment, code)

    def worker(self, pool: str) -> None:
        """Take the runs that wait in a pool, and end with them."""
        self._run(
            [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--run-once"], self.environment, 0
        )

    def _run(self, command: list[str], environment: dict[str, str], code: int) -> None:
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=500)
        said = done.stdout + done.stderr
        assert done.returncode == code, said
        self.left.texts[f"terminal {next(self._numbers)}: {' '.join(command[2:5])}"] = said
        if code == 2:
            self.left.refused.append((done.returncode, said))

    def request(self, method: str, path: str, body: Any = None) -> httpx.Response:
        user, _, password = SECRETS["PREFECT_API_AUTH_STRING"].partition(":")
        while True:
            answer = httpx.request(method, f"{self.url}/{path}", json=body, auth=(user, password), timeout=120)
            if answer.status_code != 503:  # SQLite was busy with what else the server does
                return answer
            time.sleep(0.5)

    def listed(self, path: str) -> list[Any]:
        found: list[Any] = []
        while True:
            page = (
                self.request("POST", f"{path}/filter", {"limit": 200, "offset": len(found)}).raise_for_status().json()
            )
            found += page
            if len(page) < 200:
                return found


class EchoingServer(ModelServer):
    """A model server that is wrong about some questions, and quotes the key that it was sent."""

    def __init__(self) -> None:
        super().__init__(self._answer)
        self.mended = False

    def _answer(self, request: dict[str, Any], call: int) -> Reply | Status:
        sent = self.headers[-1]["Authorization"]
        asked = str(request["messages"][-1]["content"])
        if not self.mended:
            for word, code in {"rotor": 401, "piston": 503, "valve": 200}.items():
                if word in asked:
                    return Status(code, json.dumps({"error": {"message": f"not for {sent}"}}))
        return searcher(request, call)


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory, s3_server: str) -> Iterator[Left]:
    """The chain of flows: with failures that quote secrets, and settings that hold some."""
    from tests.small_collection import write_documents

    folder = tmp_path_factory.mktemp("secrets")
    (folder / "input").mkdir()
    documents = write_documents(folder / "input")
    model = str(tiny_model(folder / "model"))
    storage._client().create_bucket(Bucket="secrets")
    root, found = "s3://secrets/team", Left()
    local = {name: str(folder / name.lower()) for name in ("DRAG_HOME", "DRAG_CACHE", "PREFECT_HOME")}
    environment = SECRETS | local | {"AWS_ENDPOINT_URL": s3_server, "AWS_DEFAULT_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_SERVER_API_AUTH_STRING", SECRETS["PREFECT_API_AUTH_STRING"])
        with server_process(folder / "server") as url, EchoingServer() as server:
            chain = Chain(url, root, environment, found)
            asking = ["--base-url", server.url, "--model", "base", "--protocol", "tags", "--max-iterations", "3"]
            asking += ["--max-retries", "0"]
            splits = ["--train-ratio", "0.5", "--dev-ratio", "0"]
            chain.drag("deploy")
            given = ["--documents", str(documents / "pdfs"), "--questions", str(documents / "questions.jsonl")]
            chain.drag("ingest", *given, *splits)
            chain.drag("collect", "--split", "all", *asking, code=7)

            # what a form would send: refused where it holds a password, run by a worker where not
            (deployment,) = (d["id"] for d in chain.listed("deployments") if d["name"] == "collect")
            create = f"deployments/{deployment}/create_flow_run"
            bad = {"server": {"base_url": [f"http://user:{PASSWORD}@127.0.0.1:1/v1"]}}
            assert chain.request("POST", create, {"parameters": bad}).status_code == 409
            good = {
                "storage": root,
                "collect": {"split": "all", "samples": 2},
                "agent": {"protocol": "tags", "max_iterations": 3},
                "server": {"base_url": [server.url], "model": "base", "max_retries": 0},
            }
            waiting = {"parameters": good, "state": {"type": "SCHEDULED"}}
            assert chain.request("POST", create, waiting).status_code == 201
            chain.worker("gpu-serving")
            chain.drag("collect", "--base-url", f"http://user:{PASSWORD}@127.0.0.1:1/v1", code=2)
            chain.drag("process", code=3, AWS_ENDPOINT_URL="http://127.0.0.1:9")
            chain.drag("process", code=2, AWS_ENDPOINT_URL=f"http://user:{PASSWORD}@127.0.0.1:9")

            server.mended = True
            chain.drag("collect", "--split", "all", *asking)
            chain.drag("process")
            chain.drag("format", *asking[4:8])
            chain.drag("finetune", "sft", "--model", model, "--epochs", "1", "--lora-r", "4", "--no-bf16")
            chain.drag("compare", "--compare", "question", "base", code=3)
            recipe = folder / "evaluate.yaml"
            recipe.write_text(json.dumps({"variants": [{"name": n, "model": n} for n in ("question", "base")]}))
            chain.drag("evaluate", "--config", str(recipe), "--split", "all", "--resamples", "500", *asking)

            found.keys_sent = {headers["Authorization"] for headers in server.headers}
            found.texts |= {f"request {n}": json.dumps(body) for n, body in enumerate(server.requests)}
            _read_api(chain, found)
        for file in storage.iter_files("s3://secrets"):
            found.texts[file] = _readable(storage.read_bytes(file), file)
        for file in sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink()):
            found.texts[str(file.relative_to(folder))] = _readable(file.read_bytes(), file.name)
        yield found


def _read_api(chain: Chain, found: Left) -> None:
    """All that the Prefect API tells."""
    kinds = "flows deployments flow_runs task_runs artifacts logs block_documents block_types block_schemas variables"
    for kind in [*kinds.split(), "work_pools", "work_queues", "automations", "v2/concurrency_limits"]:
        found.texts[f"api {kind}"] = json.dumps(chain.listed(kind))
    for run in chain.listed("flow_runs"):
        states = chain.request("GET", f"flow_run_states/?flow_run_id={run['id']}").raise_for_status()
        found.texts[f"api states {run['id']}"] = states.text
    page = chain.request("POST", "events/filter", {"limit": 50}).raise_for_status().json()
    events = page["events"]
    while page["next_page"]:
        user, _, password = SECRETS["PREFECT_API_AUTH_STRING"].partition(":")
        page = httpx.get(page["next_page"], auth=(user, password), timeout=120).raise_for_status().json()
        events += page["events"]
    found.texts["api events"] = json.dumps(events)


def _readable(content: bytes, name: str) -> str:
    """A file's text; of Parquet all that its compressed columns and its metadata hold."""
    text = content.decode("utf-8", errors="replace")
    if name.endswith(".parquet"):
        table = pq.read_table(io.BytesIO(content))
        text += json.dumps(table.to_pylist(), default=str) + str(table.schema.metadata)
    return text


def _places(left: Left, needle: str) -> list[str]:
    return [place for place, text in left.texts.items() if needle in text]


def test_the_search_finds_what_is_there(left: Left) -> None:
    """Or finding no secret would mean nothing."""
    assert left.keys_sent == {f"Bearer {SECRETS['OPENAI_API_KEY']}"}
    for known in ("How heavy is the turbine?", "mass turbine"):
        assert any(place.startswith("s3://") and place.endswith(".parquet") for place in _places(left, known))
    kinds = {place.split()[1] for place in _places(left, "collect") if place.startswith("api ")}
    assert kinds >= {"flows", "deployments", "flow_runs", "task_runs", "artifacts", "logs", "events"}
    assert any(place.startswith("api states") for place in _places(left, "rollouts failed"))
    assert "drag-notify" in left.texts["api block_documents"]
    quoted = _places(left, "not for Bearer [OPENAI_API_KEY]")
    assert any("rollouts/" in place for place in quoted), "the server's words are kept, without the key"


@pytest.mark.parametrize("needle", NEEDLES)
def test_no_secret_is_anywhere(left: Left, needle: str) -> None:
    assert _places(left, needle) == []


def test_an_address_with_a_password_is_refused_with_what_to_do_instead(left: Left) -> None:
    server, storage_ = (said for _, said in left.refused)
    assert "OPENAI_API_KEY" in server
    assert "AWS_SECRET_ACCESS_KEY" in storage_


def test_a_secret_is_taken_out_whole_even_where_one_holds_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "abcdefgh")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "abcdefgh-and-more")
    monkeypatch.setenv("HF_TOKEN", "EMPTY")
    assert without_secrets("abcdefgh-and-more, abcdefgh, EMPTY") == "[AWS_SECRET_ACCESS_KEY], [OPENAI_API_KEY], EMPTY"


def test_a_prefect_server_of_ours_listens_to_this_machine_alone(tmp_path: Path) -> None:
    with server_process(tmp_path / "server") as url:
        assert listening()[int(url.removesuffix("/api").rsplit(":", 1)[-1])] == "127.0.0.1"


def test_vllm_is_started_for_this_machine_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRAG_VLLM_PYTHON", sys.executable)
    command = serve.command(tmp_path, 8000, config.Serve())
    assert command[command.index("--host") + 1] == "127.0.0.1"


SOURCES = sorted([*(ROOT / "tasks").rglob("*.py"), *(ROOT / "flows").rglob("*.py")])
PICKLERS = {"pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib", "pandas"}


def _pickles(tree: ast.AST) -> Iterator[str]:
    """What could run code that was stored as data."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in PICKLERS)
        elif isinstance(node, ast.ImportFrom):
            if (node.module or "").split(".")[0] in PICKLERS:
                yield str(node.module)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given: dict[str | None, Any] = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
            if called == "torch.load" and given.get("weights_only") is not True:
                yield called
            if given.get("allow_pickle") or (given.get("result_serializer") or "json") != "json":
                yield ast.unparse(node)
            if called in ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec"):
                yield called


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_code_reads_a_pickle(source: Path) -> None:
    assert list(_pickles(ast.parse(source.read_text()))) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from cloudpickle import loads",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "np.load(f, allow_pickle=True)",
        "task(result_serializer='pickle')",
        "yaml.load(f)",
    ],
)
def test_the_check_sees_what_reads_a_pickle(code: str) -> None:
    assert len(list(_pickles(ast.parse(code)))) == 1
