"""What a script that calls `drag` can tell from its exit code, as the README lists them."""

from pathlib import Path

import pytest

from flows.cli import main
from tests.model_server import ModelServer, Reply, Status
from tests.small_collection import ingest_small, searcher
from tests.tiny_model import tiny_model


def test_each_kind_of_failure_has_a_code_of_its_own(
    tmp_path: Path, documents: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = str(tmp_path / "store")

    def drag(command: str, *flags: str) -> int:
        return main([*command.split(), "--storage", root, *flags])

    assert drag("process") == 3
    assert drag("ingest", "--documents", str(tmp_path / "nowhere")) == 2
    ingest_small(root, documents)
    collect = ("--split", "all", "--model", "base", "--max-retries", "0", "--base-url")
    assert drag("collect", *collect, "http://127.0.0.1:9/v1") == 4
    with ModelServer(lambda request, call: Reply("I would rather not.")) as server:
        assert drag("collect", *collect, server.url) == 5
        server.script = lambda request, call: (
            Status(503) if "piston" in request["messages"][-1]["content"] else searcher(request, call)
        )
        assert drag("collect", *collect, server.url) == 7
        assert "the same command again, or Retry, redoes only these" in capsys.readouterr().err
        assert drag("collect", *collect, server.url, "--no-resume") == 7
        assert "the same command again without --no-resume, or Retry, redoes" in capsys.readouterr().err
        before, server.script = server.calls, searcher
        assert drag("collect", *collect, server.url + "/") == 0
        assert server.calls - before < 4 + 3 * 2 * 4  # the self-test, and what had failed
    assert drag("process") == 0
    assert drag("format", "--split", "dev") == 8
    assert drag("format", "--split", "all") == 0
    assert drag("finetune sft", "--model", str(tiny_model(tmp_path / "model")), "--max-length", "16") == 6
