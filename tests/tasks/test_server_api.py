"""What model servers are asked, of real ones over sockets that answer as they like."""

import contextlib
import http.server
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tasks import artifact, server_api
from tasks.artifact import Artifact
from tasks.errors import ConfigError, ServerError

KEY = "sk-of-this-test"
MODELS = {"data": [{"id": "base", "max_model_len": 4096}, {"id": "adapter", "max_model_len": None}]}


@dataclass
class Asked:
    """A server at `url`, and the requests that it got: path and key."""

    url: str
    requests: list[tuple[str, str | None]] = field(default_factory=list)


@contextlib.contextmanager
def _server(answers: dict[str, tuple[int, object]], host: str = "127.0.0.1") -> Iterator[Asked]:
    """A server that answers a path with a status and JSON, text as it is; with another address where the status is 307."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.requests.append((self.path, self.headers.get("Authorization")))
            status, said = answers.get(self.path, (404, {}))
            body = said.encode() if isinstance(said, str) else json.dumps(said).encode()
            self.send_response(status)
            if status == 307:
                self.send_header("Location", str(said))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.do_GET()

        def log_message(self, *args: object) -> None:
            """Say nothing."""

    with http.server.ThreadingHTTPServer((host, 0), Handler) as server:
        asked = Asked(f"http://{host}:{server.server_port}/v1")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield asked
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture
def adapter(tmp_path: Path) -> Artifact:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    return artifact.write_folder(folder, str(tmp_path / "stored"), "adapter/1", 1, {})


def test_a_server_says_what_it_serves() -> None:
    with _server(
        {"/v1/models": (200, MODELS), "/version": (200, {"version": "0.32.0"}), "/health": (200, "")}
    ) as asked:
        assert server_api.served_models(asked.url) == ["base", "adapter"]
        assert server_api.context_length(asked.url) == 4096
        assert server_api.engine_version(asked.url) == "0.32.0"
        server_api.check_health(asked.url)
    assert {key for _, key in asked.requests} == {f"Bearer {KEY}"}


def test_the_key_does_not_go_on_to_another_host() -> None:
    with (
        _server({"/v1/models": (200, MODELS)}, host="127.0.0.2") as other,
        _server({"/v1/models": (307, f"{other.url}/models")}) as asked,
    ):
        assert server_api.served_models(asked.url) == ["base", "adapter"]
    assert asked.requests == [("/v1/models", f"Bearer {KEY}")]
    assert other.requests == [("/v1/models", None)]


def test_on_this_machine_no_proxy_is_asked_and_elsewhere_one_that_cannot_be_used_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1")
    server_api._client.cache_clear()
    try:
        with _server({"/v1/models": (200, MODELS)}) as asked:
            assert server_api.served_models(asked.url) == ["base", "adapter"]
        with pytest.raises(ConfigError, match="proxy that the environment names"):
            server_api.served_models("http://192.0.2.1:8000/v1")
    finally:
        server_api._client.cache_clear()


def test_a_line_end_behind_the_key_is_none_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a file of secrets often has it."""
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")
    with _server({"/v1/models": (401, {})}) as asked, pytest.raises(ServerError) as refused:
        server_api.served_models(asked.url)
    assert asked.requests == [("/v1/models", f"Bearer {KEY}")]
    assert KEY not in str(refused.value)


@pytest.mark.parametrize("said", ["no JSON", [], {}, {"data": 1}, {"data": [1]}, {"data": [{}]}])
def test_what_is_no_model_server_is_none(said: object) -> None:
    with _server({"/v1/models": (200, said), "/version": (200, said)}) as asked:
        with pytest.raises(ServerError, match=f"no model server answers at {asked.url}: "):
            server_api.served_models(asked.url)
        assert server_api.engine_version(asked.url) is None


def test_what_refuses_us_is_told_with_its_status() -> None:
    with _server({"/v1/models": (401, {}), "/health": (401, {}), "/version": (401, {"version": "1"})}) as asked:
        for ask in (server_api.served_models, server_api.check_health):
            with pytest.raises(ServerError, match="401 Unauthorized"):
                ask(asked.url)
        assert server_api.engine_version(asked.url) is None


def test_a_dead_engine_is_not_well_and_a_server_without_health_is_asked_otherwise() -> None:
    with _server({"/health": (503, "")}) as asked, pytest.raises(ServerError, match="/health answers 503"):
        server_api.check_health(asked.url)
    with _server({"/v1/models": (200, MODELS)}) as asked:
        server_api.check_health(asked.url)
    with pytest.raises(ServerError, match=r"/health does not answer: .+"):  # it is gone by now
        server_api.check_health(asked.url)


def test_an_adapter_is_loaded_once_under_a_name_of_its_own(adapter: Artifact) -> None:
    name = server_api.adapter_name(adapter)
    with _server({"/v1/models": (200, MODELS), "/v1/load_lora_adapter": (200, "done")}) as asked:
        assert server_api.load_adapter(asked.url, adapter) == name
    assert [path for path, _ in asked.requests] == ["/v1/models", "/v1/load_lora_adapter"]
    with _server({"/v1/models": (200, {"data": [{"id": name}]})}) as asked:
        assert server_api.load_adapter(asked.url, adapter) == name
    assert [path for path, _ in asked.requests] == ["/v1/models"]


def test_why_an_adapter_is_refused_is_told_without_the_key(adapter: Artifact) -> None:
    refusal = "x" * (500 - len(KEY) // 2) + KEY  # cut before it is taken out, half of it would be left
    with (
        _server({"/v1/models": (200, MODELS), "/v1/load_lora_adapter": (400, refusal)}) as asked,
        pytest.raises(ServerError, match="vLLM refused adapter") as refused,
    ):
        server_api.load_adapter(asked.url, adapter)
    assert KEY[: len(KEY) // 2] not in str(refused.value)
