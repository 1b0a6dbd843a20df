"""Asking questions: given ones, typed ones, of a server and of a model in this process."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flows.infer import infer
from flows.show import snippet
from tasks import config
from tasks.artifact import provenance, write_folder
from tasks.errors import ServerError
from tasks.model import model_fingerprint
from tasks.refs import save_ref
from tests.model_server import ModelServer, Reply, Status
from tests.small_collection import ingest_small, searcher
from tests.tiny_model import tiny_model

AGENT = config.Agent(protocol="tags", max_iterations=3)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, documents: Path) -> str:
    made = str(tmp_path_factory.mktemp("store"))
    ingest_small(made, documents)
    return made


def scripted(request: dict[str, Any], call: int) -> Reply | Status:
    """As `searcher`, but answers with a citation, and refuses to speak of pistons."""
    asked = "\n".join(str(message["content"]) for message in request["messages"])
    if "piston" in asked:
        return Status(400)
    said = searcher(request, call)
    return (
        Reply('<answer>7 kg <cite file="boiler.pdf" page="2"/></answer>') if "<answer>" in str(said.content) else said
    )


def _run(root: str, url: str, *questions: str) -> config.InferRun:
    server = config.Server(base_url=url, model="base", max_retries=0)
    return config.InferRun(storage=root, agent=AGENT, server=server, question=list(questions))


def test_every_turn_is_shown_with_its_pages_and_the_answer_with_its_source(
    root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with ModelServer(scripted) as server:
        infer(_run(root, server.url, "How heavy is the boiler?", "How heavy is the rotor?"))
    shown = " ".join(capsys.readouterr().out.split())
    for said in (
        *("How heavy is the boiler?", "turn 1", "So.", "search read boiler", "1. boiler.pdf, page 1"),
        *(
            "Safety of the boiler.",
            "turn 2",
            "search mass boiler",
            "1. boiler.pdf, page 2",
            "The mass of the boiler is",
        ),
        *("turn 3", "answer 7 kg", "from boiler.pdf, page 2", "How heavy is the rotor?", "search mass rotor"),
    ):
        assert said in shown, said


def test_a_given_question_that_cannot_be_asked_ends_in_an_error(root: str) -> None:
    with ModelServer(scripted) as server, pytest.raises(ServerError, match="1 of 2 questions"):
        infer(_run(root, server.url, "How heavy is the piston?", "How heavy is the boiler?"))


def _command(root: str, *flags: str) -> list[str]:
    return [sys.executable, "-m", "flows.cli", "infer", "--storage", root, "--max-iterations", "3", *flags]


def _terminal(command: list[str], typed: str) -> tuple[str, int]:
    """What a program shows on a terminal of its own, where a person types; and its exit code."""
    theirs, ours = pty.openpty()
    with subprocess.Popen(command, stdin=ours, stdout=ours, stderr=ours, start_new_session=True) as process:
        os.close(ours)
        os.write(theirs, typed.encode())
        shown = b""
        try:
            while part := os.read(theirs, 4096):
                shown += part
        except OSError:  # so Linux says that nobody has the terminal open any more
            pass
        os.close(theirs)
    return re.sub(r"\x1b\[[0-9;]*m", "", shown.decode()), process.returncode


def test_a_session_on_a_terminal_outlasts_an_error_and_ends_with_an_empty_line(root: str) -> None:
    with ModelServer(scripted) as server:
        command = _command(root, "--base-url", server.url, "--model", "base", "--max-retries", "0")
        shown, code = _terminal(command, "How heavy is the piston?\nHow heavy is the boiler?\n\n")
    assert code == 0, shown
    assert shown.count("(empty to end)") == 3
    assert "http_status" in shown[: shown.index("boiler.pdf")]
    assert "7 kg" in shown


def test_a_session_survives_a_server_that_dies_and_ends_with_its_input(root: str) -> None:
    with ModelServer(scripted) as server:
        url = server.url

        def once(request: dict[str, Any], call: int) -> Reply | Status:
            server.models = []  # from now on it serves nothing, and whoever connects is told so
            return scripted(request, call)

        server.script = once
        command = _command(root, "--base-url", url, "--model", "base", "--max-retries", "0")
        typed = "How heavy is the boiler?\nHow heavy is the rotor?\n"
        done = subprocess.run(command, input=typed, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "7 kg" in done.stdout
    assert "ConfigError" in done.stdout[done.stdout.index("7 kg") :]


def test_a_model_with_its_adapter_in_this_process(
    root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from tasks.agent.prompts import prompt_fingerprint

    monkeypatch.setenv("DRAG_VLLM_PYTHON", "/nowhere")
    model = tiny_model(tmp_path / "model")
    torch.manual_seed(0)
    lora = LoraConfig(target_modules="all-linear", lora_alpha=64, init_lora_weights=False)
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(model), lora)
    tuned.save_pretrained(tmp_path / "adapter")
    facts = provenance(base_fingerprint=model_fingerprint(model), prompt_fingerprints=[prompt_fingerprint(AGENT)])
    save_ref(root, "adapter", write_folder(tmp_path / "adapter", f"{root}/adapters/a", "adapter/1", 1, facts))
    shown = []
    for adapter in ("", "newest", ""):
        settings = config.InferRun(
            storage=root,
            agent=AGENT,
            sampling=config.Sampling(max_tokens=16),
            sampling_config="high_temp",
            server=config.Server(model=str(model)),
            question=["How heavy is the rotor?"],
            adapter=adapter,
            in_process=True,
        )
        infer(settings)
        shown.append(capsys.readouterr().out)
    assert all("turn 3" in text and "no answer" in text for text in shown)
    assert shown[0] == shown[2] != shown[1]


def test_a_snippet_is_where_the_query_is() -> None:
    text = "Preface. " * 40 + "The valve closes at 9 bar. " + "Appendix. " * 40
    assert "valve closes at 9 bar" in snippet(text, "no such valve")
    assert snippet(text, "absent").startswith("Preface.")
    assert snippet("", "valve") == ""
    assert len(snippet(text, "valve")) < 160
