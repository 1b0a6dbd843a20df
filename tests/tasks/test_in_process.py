"""A model in this process: what it writes is what a server would be asked for."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from tasks import config
from tasks.agent import prompts
from tasks.agent.completion import Complete, Completion, CompletionError
from tasks.agent.protocol import as_stored
from tasks.agent.sampling import resolve
from tasks.in_process import open_in_process
from tests.tiny_model import tiny_model

AGENT = config.Agent()
CALL = {"id": "c", "type": "function", "function": {"name": "search_documents", "arguments": '{"query": "fee"}'}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def complete(model: Path) -> Complete:
    return open_in_process(config.Server(model=str(model)), None, None)()


def ask(
    complete: Complete, options: dict[str, Any] | None = None, *, seed: int = 0, name: Any = "greedy", **drawn: Any
) -> Completion:
    drawn = {"max_tokens": 24} | drawn
    messages = prompts.wire_prompt("What is the fee?", AGENT)
    return asyncio.run(complete(messages, options or {}, resolve(name, config.Sampling(**drawn)), seed))


def test_greedy_is_what_the_model_finds_likeliest(model: Path, complete: Complete) -> None:
    from transformers import AutoModelForCausalLM

    tokenizer, network = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    text = tokenizer.apply_chat_template(
        prompts.prompt_messages("What is the fee?", AGENT), tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    length = ids.shape[1]
    for _ in range(24):
        with torch.inference_mode():
            ids = torch.cat([ids, network(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    found = ask(complete)
    assert found.raw_text == tokenizer.decode(ids[0, length:], skip_special_tokens=True)
    assert (found.prompt_tokens, found.completion_tokens, found.finish_reason) == (length, 24, "length")


def test_a_seed_decides_what_is_drawn(complete: Complete) -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    texts = [ask(complete, seed=seed, name="high_temp").raw_text for seed in (1, 2, 1)]
    assert texts[0] == texts[2] != texts[1]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert ask(complete, name="high_temp", top_p=1e-6).raw_text == ask(complete).raw_text
    assert ask(complete, repetition_penalty=50.0).raw_text != ask(complete).raw_text


@pytest.mark.parametrize("seed", range(4))
def test_a_stop_string_ends_it(complete: Complete, seed: int) -> None:
    drawn = {"seed": seed, "name": "high_temp"}
    whole = ask(complete, **drawn).raw_text
    stop = whole[len(whole) // 2 :][:3]
    cut = whole.index(stop)
    kept = ask(complete, {"stop": ["not there", stop], "include_stop_str_in_output": True}, **drawn)
    assert (kept.raw_text, kept.finish_reason) == (whole[: cut + len(stop)], "stop")
    assert kept.completion_tokens is not None
    assert kept.completion_tokens < 24
    assert ask(complete, {"stop": [stop]}, **drawn).raw_text == whole[:cut]


def test_the_context_is_never_exceeded(model: Path, complete: Complete) -> None:
    length = ask(complete).prompt_tokens
    assert length is not None
    short = open_in_process(config.Server(model=str(model)), None, length + 5)()
    assert ask(short).completion_tokens == 5
    with pytest.raises(CompletionError, match=f"the context length is {length}") as full:
        ask(open_in_process(config.Server(model=str(model)), None, length)())
    assert full.value.out_of_context


def test_tools_and_calls_are_seen_as_in_training(model: Path, complete: Complete) -> None:
    tools = prompts.tool_definitions(config.Agent(protocol="tools"))
    called = [
        *prompts.wire_prompt("What is the fee?", config.Agent(protocol="tools")),
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c", "content": "Found."},
    ]
    tokenizer = AutoTokenizer.from_pretrained(model)
    trained = tokenizer.apply_chat_template(
        [as_stored(message) for message in called], tools=tools, add_generation_prompt=True, return_dict=True
    )
    options = {"tools": tools, "tool_choice": "auto"}
    found = asyncio.run(complete(called, options, resolve("greedy", config.Sampling(max_tokens=1)), 0))
    assert found.prompt_tokens == len(trained["input_ids"])
    assert json.dumps(called[2]["tool_calls"][0]["function"]["name"]) in tokenizer.decode(trained["input_ids"])


def test_a_request_that_takes_too_long_is_given_up(model: Path) -> None:
    hurried = open_in_process(config.Server(model=str(model), request_timeout=0.01), None, None)()
    with pytest.raises(CompletionError, match="deadline"):
        ask(hurried, max_tokens=8000)
    assert ask(open_in_process(config.Server(model=str(model)), None, None)(), max_tokens=2).completion_tokens == 2


def test_what_a_template_refuses_is_the_requests_fault(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "strict")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(CompletionError, match=r"http_status.*roles must alternate"):
        ask(open_in_process(config.Server(model=str(folder)), None, None)())
