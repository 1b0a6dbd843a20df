"""The command line that serves a model: on loopback, no pickle read, and a recipe's names known to the installed vLLM."""

import ast
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml

from tasks import config, serve
from tasks.beside_vllm.key_everywhere import KeyEverywhere
from tasks.errors import ConfigError, ServerError
from tasks.network import free_port
from tests.model_server import ModelServer, Reply, Status
from tests.tiny_model import tiny_model

RECIPES = sorted(Path("deployments/recipes").glob("*.yaml"))


@pytest.fixture
def vllm() -> Path:
    """The folder of the installed vLLM package."""
    try:
        python = Path(serve.vllm_python())
    except ServerError as error:
        pytest.skip(str(error))
    return next(python.parents[1].glob("lib/python3*/site-packages/vllm"))


def _registered(file: Path) -> set[str]:
    """The names that vLLM's module registers parsers under, read without importing it."""
    keys: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Dict):
            keys |= {key.value for key in node.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}
    return keys


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(serve, "vllm_python", lambda: "python")
    return lambda **settings: serve.command(tmp_path, 8000, config.Serve(**settings))


def _value(args: list[str], flag: str) -> str:
    return args[args.index(flag) + 1]


def test_it_listens_on_loopback_and_reads_no_pickle(command) -> None:
    args = command()
    assert _value(args, "--host") == "127.0.0.1"
    assert _value(args, "--load-format") == "safetensors"
    assert "--trust-remote-code" not in args


def test_no_key_is_on_the_command_line(command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-nobody")
    assert "sk-of-nobody" not in " ".join(command())
    assert serve.environment()["VLLM_API_KEY"] == "sk-of-nobody"


def test_a_key_is_demanded_of_every_request(command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-nobody")
    assert _value(command(), "--middleware") == "key_everywhere.KeyEverywhere"
    monkeypatch.delenv("OPENAI_API_KEY")
    assert "--middleware" not in command()


@pytest.mark.parametrize(
    ("path", "key", "status"),
    [("/health", None, 200), ("/invocations", None, 401), ("/invocations", "other", 401), ("/v1/models", "ours", 200)],
)
async def test_what_holds_no_key_is_not_handed_on(
    path: str, key: str | None, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "ours")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    headers = {"Authorization": f"Bearer {key}"} if key else {}
    transport = httpx.ASGITransport(app=KeyEverywhere(app))
    async with httpx.AsyncClient(transport=transport, base_url="http://vllm") as client:
        assert (await client.post(path, headers=headers)).status_code == status


@pytest.mark.parametrize(("asked", "given"), [(1, "1"), (4, "8"), (16, "16"), (17, "32"), (512, "512")])
def test_the_largest_rank_is_one_that_vllm_takes(command, asked: int, given: str) -> None:
    assert _value(command(max_lora_rank=asked), "--max-lora-rank") == given


def test_settings_become_flags(command) -> None:
    args = command(tensor_parallel_size=2, data_parallel_size=4, images_per_prompt=0, tower_lora=True, max_num_seqs=7)
    assert [_value(args, f"--{name}-size") for name in ("tensor-parallel", "data-parallel")] == ["2", "4"]
    assert json.loads(_value(args, "--limit-mm-per-prompt")) == {"image": 0, "video": 0}
    assert _value(args, "--max-num-seqs") == "7"
    assert "--enable-tower-connector-lora" in args


def test_the_installed_vllm_knows_every_flag(vllm: Path, command) -> None:
    declared = (vllm / "engine" / "arg_utils.py").read_text() + "".join(
        file.read_text() for file in (vllm / "entrypoints").rglob("cli_args.py")
    )
    args = command(
        tensor_parallel_size=2,
        images_per_prompt=1,
        tower_lora=True,
        max_model_len=1024,
        tool_call_parser="hermes",
        reasoning_parser="qwen3",
    )
    for flag in (arg for arg in args if arg.startswith("--")):
        names = {f'"{flag}"', f"{flag.removeprefix('--no-').removeprefix('--').replace('-', '_')}:"}
        assert any(name in declared for name in names), flag


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipes_parsers_are_those_of_the_installed_vllm(recipe: Path, vllm: Path) -> None:
    settings = config.Serve.model_validate(yaml.safe_load(recipe.read_text()).get("serve") or {})
    if settings.tool_call_parser:
        assert settings.tool_call_parser in _registered(vllm / "tool_parsers" / "__init__.py")
    if settings.reasoning_parser:
        assert settings.reasoning_parser in _registered(vllm / "reasoning" / "__init__.py")


def test_a_server_that_others_can_reach_needs_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with (
        pytest.raises(ConfigError, match="OPENAI_API_KEY"),
        serve.serving("nobody/asked", config.Serve(host="0.0.0.0"), tmp_path, free_port()),
    ):
        pass


def test_the_logs_of_the_last_servers_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRAG_VLLM_PYTHON", sys.executable)  # which has no vLLM
    names = [f"vllm-20261124T1200{second:02d}-{9000 - second}.log" for second in range(30)]
    for name in names:
        (tmp_path / name).touch()
    model = tiny_model(tmp_path / "model")
    with pytest.raises(ServerError, match="vllm"), serve.serving(str(model), config.Serve(), tmp_path, free_port()):
        pass
    *kept, new = sorted(path.name for path in tmp_path.glob("vllm-*.log"))
    assert kept == names[10:]
    assert new not in names


_ANSWERS = """
import http.server, socket, sys

class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self, body=b'{"data": [{"id": "base"}]}'):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        self.do_GET(b"{}")

class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6

host, port = (sys.argv[sys.argv.index(flag) + 1] for flag in ("--host", "--port"))
Server((host, int(port)), Answers).serve_forever()
"""


def test_it_is_asked_where_it_listens_by_ipv6(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"this machine has no IPv6: {error}")
    vllm = tmp_path / "python"  # in the place of the interpreter that has vLLM
    vllm.write_text(f"#!{sys.executable}\n{_ANSWERS}")
    vllm.chmod(0o755)
    monkeypatch.setenv("DRAG_VLLM_PYTHON", str(vllm))
    model, settings = tiny_model(tmp_path / "model"), config.Serve(host="::1", start_timeout=20)
    with serve.serving(str(model), settings, tmp_path / "work", free_port()) as served:
        assert served.base_url.startswith("http://[::1]:")
        assert [known.id for known in openai.OpenAI(base_url=served.base_url, api_key="none").models.list()] == ["base"]


def test_a_port_that_something_listens_at_is_refused(tmp_path: Path) -> None:
    """What listens there may be another vLLM, which answers for the same name."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(ServerError, match=rf"cannot listen at 127.0.0.1:{port} \(Address already in use"),
            serve.serving("nobody/model", config.Serve(), tmp_path / "work", port=port),
        ):
            pass
    assert list((tmp_path / "work").glob("*.log")) == []


def test_a_server_that_listens_there_first_is_not_taken_for_ours(tmp_path: Path) -> None:
    """Two that start at once are both free to: vLLM listens only when its model is loaded."""

    def of_another_model(request: dict[str, Any], call: int) -> Reply | Status:
        return Reply("Hello") if request["model"] == serve.BASE_NAME else Status(404)

    with ModelServer(of_another_model) as first:
        ours = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        try:
            with pytest.raises(ServerError, match="another server listens at"):
                serve._wait_until_it_answers(serve.Served(first.url, ours, tmp_path / "log"), "started-1", 20, None)
        finally:
            ours.kill()
            ours.wait(10)
