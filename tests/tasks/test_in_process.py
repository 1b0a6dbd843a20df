"""A model in this process: what it writes is what a server would be asked for."""

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from tasks import config
from tasks.agent import prompts
from tasks.agent.completion import Complete, Completion, CompletionError
from tasks.agent.message import PLACEHOLDER, Image
from tasks.agent.protocol import as_stored
from tasks.agent.sampling import resolve
from tasks.errors import TrainingError
from tasks.in_process import open_in_process
from tests.tiny_model import tiny_model
from tests.tiny_vlm import tiny_vlm

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


def test_a_models_own_generation_settings_change_nothing(model: Path, complete: Complete, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    settings = json.loads((folder / "generation_config.json").read_text())
    settings |= {
        "do_sample": True,
        "top_k": 1,
        "min_p": 0.9,
        "repetition_penalty": 50.0,
        "temperature": 0.1,
        "top_p": 0.1,
    }
    (folder / "generation_config.json").write_text(json.dumps(settings))
    own = open_in_process(config.Server(model=str(folder)), None, None)()
    for name in ("greedy", "high_temp"):
        assert ask(own, name=name).raw_text == ask(complete, name=name).raw_text
    assert ask(own, name="high_temp").raw_text != ask(own).raw_text


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


def test_page_images_are_seen_as_the_models_own_code_sees_them(tmp_path: Path) -> None:
    """What is written is what the model finds likeliest behind the images; behind others, it writes something else."""
    from PIL import Image as Picture
    from transformers import AutoImageProcessor, Qwen3VLForConditionalGeneration

    folder = tiny_vlm(tmp_path / "vlm")
    network = Qwen3VLForConditionalGeneration.from_pretrained(folder)
    with torch.no_grad():  # as it is, what it writes hangs on the last token alone
        for name, parameter in network.named_parameters():
            if "merger" in name or "v_proj" in name or "o_proj" in name:
                parameter.mul_(20)
    network.save_pretrained(folder)
    images = []
    for number, (size, color) in enumerate([((200, 260), "black"), ((96, 64), "red")]):
        picture = Picture.new("RGB", size, "white")
        picture.paste(color, (10, 10, 60, 50))
        picture.save(tmp_path / f"{number}.png")
        width, height = size
        images.append(Image(file="a.pdf", page=number + 1, key=f"{number}.png", width=width, height=height))
    seeing = open_in_process(config.Server(model=str(folder)), None, None, str(tmp_path))()

    def asked(*shown: Image) -> Completion:
        found = {"role": "user", "content": "Found: " + PLACEHOLDER * len(shown), "images": list(shown)}
        messages = [*prompts.wire_prompt("What is the fee?", AGENT), found]
        return asyncio.run(seeing(messages, {}, resolve("greedy", config.Sampling(max_tokens=8)), 0))

    tokenizer = AutoTokenizer.from_pretrained(folder)
    pixels = AutoImageProcessor.from_pretrained(folder)(
        images=[Picture.open(tmp_path / image["key"]) for image in images], return_tensors="pt"
    )
    text = "Found: "
    for grid in pixels["image_grid_thw"]:
        text += f"<|vision_start|>{'<|image_pad|>' * (int(grid.prod()) // 4)}<|vision_end|>"
    messages = [*prompts.prompt_messages("What is the fee?", AGENT), {"role": "user", "content": text}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(whole, add_special_tokens=False, return_tensors="pt")["input_ids"]
    length = ids.shape[1]
    for _ in range(8):
        kinds = (ids == network.config.image_token_id).int()
        with torch.inference_mode():
            logits = network(input_ids=ids, mm_token_type_ids=kinds, **pixels).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    found = asked(*images)
    assert found.prompt_tokens == length
    assert found.raw_text == tokenizer.decode(ids[0, length:], skip_special_tokens=True)
    assert asked(*reversed(images)).raw_text != found.raw_text
    tight = open_in_process(config.Server(model=str(folder)), None, length + 7, str(tmp_path))()
    seeing = tight  # an image gives way to the answer
    with pytest.raises(CompletionError) as full:
        asked(*images)
    assert full.value.out_of_context
    forged = [{"role": "user", "content": f"<|image_pad|> {PLACEHOLDER}", "images": images[:1]}]
    with pytest.raises(CompletionError, match="stands for an image"):
        asyncio.run(seeing(forged, {}, resolve("greedy", config.Sampling(max_tokens=1)), 0))


def test_a_model_that_reads_alone_is_asked_without_images(model: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"no model of the Qwen-VL series.*observation text"):
        open_in_process(config.Server(model=str(model)), None, None, str(tmp_path))
