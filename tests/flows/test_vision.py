"""Page images from the PDF to the adapter, with nothing scripted: a real vLLM serves a tiny Qwen3-VL, which is asked and trained.

What a model without sense writes is held to the form of an action by guided decoding.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from flows.collect import collect
from flows.finetune import finetune
from tasks import artifact, config, images, refs, serve, server_api, storage
from tasks.adapters import check_adapter
from tasks.agent import prompts
from tasks.agent.message import Image, Message, images_of, openai_content
from tasks.agent.protocol import as_wire
from tasks.artifact import read_provenance, read_rows, table_of, write_table
from tasks.network import free_port
from tasks.refs import load_ref
from tasks.training.examples import encode
from tasks.training.loading import load_model, load_tokenizer
from tasks.training.sight import Sight
from tests.small_collection import ingest_small
from tests.tiny_vlm import tiny_vlm, torchvision_on_a_cpu

# patience for a machine that runs other tests meanwhile
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1200)]
PARTS: list[config.Part] = ["language", "merger", "vision"]
AGENT = config.Agent(
    observation="image", image_min_pixels=64 * 64, image_max_pixels=160 * 160, max_iterations=2, guided=True
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_vlm(tmp_path_factory.mktemp("model") / "vlm")


@pytest.fixture(scope="module")
def root(documents: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    made = storage.resolve(str(tmp_path_factory.mktemp("vision") / "store"))
    ingest_small(made, documents)
    return made


@pytest.fixture(scope="module")
def vllm(model: Path, root: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[serve.Served]:
    settings = config.Serve(max_model_len=4096, max_num_seqs=8, tower_lora=True, tool_call_parser="hermes")
    folder = tmp_path_factory.mktemp("vllm")
    with pytest.MonkeyPatch.context() as patch:
        if not serve.has_gpu():
            patch.setenv("PYTHONPATH", str(torchvision_on_a_cpu(serve.vllm_python(), folder / "torchvision")))
        server = serve.serving(str(model), settings, folder / "log", free_port(), images=Path(images.folder(root)))
        served = server.__enter__()
    try:
        yield served
    finally:
        server.__exit__(None, None, None)


def test_what_is_seen_is_what_is_trained_on(vllm: serve.Served, model: Path, root: str, tmp_path: Path) -> None:
    """The server reads the images from storage, as it may; what it saw is what the same images inline are."""
    run = config.CollectRun(
        storage=root,
        agent=AGENT,
        search=config.Search(expand="question"),  # or a query without sense would find nothing to be shown
        sampling=config.Sampling(max_tokens=256),
        server=config.Server(base_url=vllm.base_url, model=serve.BASE_NAME, send_images="url"),
        collect=config.Collect(split="all", limit=6, samples=8),  # it answers at once or searches, as chance has it
    )
    collect(run)
    rows = read_rows(load_ref(root, "trajectories"))
    assert {row["status"] for row in rows} == {"finished"}
    asked = [row for row in rows if any(map(images_of, row["messages"]))]
    assert asked, "no search found a page"

    tokenizer, sight = load_tokenizer(model), Sight(model, root)
    learned = []
    for row in asked:
        last = max(at for at, message in enumerate(row["messages"]) if message["role"] == "assistant")
        made = {"prompt": row["messages"][:last], "completion": [row["messages"][last]], "tools": row["tools"]}
        made |= {"question_id": row["question_id"], "split": "train", "format": "sft_context", "rank_score": 1.0}
        made |= {"effort": 1.0, "gt_rank": 1, "prompt_fingerprint": row["prompt_fingerprint"]}
        learned.append(made)
        (example,) = encode(made, tokenizer, "assistant", sight=sight)
        prompt = [sight.token_id if token < 0 else token for token in example.ids[: example.targets[0]]]
        assert _tokens(vllm, made["prompt"], root) == prompt
        assert row["turns"][-1]["prompt_tokens"] == len(prompt)

    facts = artifact.provenance()
    made_of = write_table(table_of(learned, "sft/2"), storage.join(root, "rows.parquet"), "sft/2", facts)
    refs.save_ref(root, "sft_context", made_of)
    training = config.Finetune(
        epochs=2, batch_size=4, lora_r=4, lr=0.05, bf16=False, parts=PARTS, mask_strategy="assistant"
    )
    finetune(config.FinetuneRun(storage=root, model=str(model), training_set="sft_context", finetune=training))
    adapter = load_ref(root, "adapter")
    assert read_provenance(adapter)["parts"] == PARTS
    assert read_provenance(adapter)["images"] > 0

    # all parts together, and the parts that see each alone
    of_parts = [_adapter_of(part, model, tmp_path / part) for part in ("merger", "vision")]
    names = [server_api.load_adapter(vllm.base_url, loaded) for loaded in (adapter, *of_parts)]
    scores = [_log_probability(vllm, served, learned[0]["prompt"], root) for served in (serve.BASE_NAME, *names)]
    assert len({tuple(score) for score in scores}) == len(scores)

    calling = _calling(next(message for message in learned[0]["prompt"] if images_of(message)))
    (example,) = encode(calling, tokenizer, "assistant", sight=sight)
    prompt = [sight.token_id if token < 0 else token for token in example.ids[: example.targets[0]]]
    assert prompt.count(sight.token_id) > 0
    assert _tokens(vllm, calling["prompt"], root, calling["tools"]) == prompt
    assert _log_probability(vllm, names[0], calling["prompt"], root)


def test_tools_are_called_and_answered_with_images(vllm: serve.Served, root: str) -> None:
    """Guided, as a model without sense calls tools only where it can do nothing else."""
    run = config.CollectRun(
        storage=root,
        agent=AGENT.model_copy(update={"protocol": "tools"}),
        search=config.Search(expand="question"),
        sampling=config.Sampling(max_tokens=512),
        server=config.Server(base_url=vllm.base_url, model=serve.BASE_NAME),
        collect=config.Collect(split="all", limit=4, samples=3),
    )
    collect(run)
    rows = read_rows(load_ref(root, "trajectories"))
    assert {row["status"] for row in rows} == {"finished"}
    answered = [row for row in rows if row["outcome"] == "answered"]
    assert answered
    assert all(row["answer"] for row in answered)
    # what it writes in an answer is at times no JSON to vLLM (a control character), but to our own parser
    assert {turn["read_by"] for row in answered for turn in row["turns"]} <= {"server", "parser"}
    assert "server" in {row["turns"][0]["read_by"] for row in answered if row["turns"][0]["action"] == "search"}
    assert any(images_of(m) for row in rows for m in row["messages"] if m["role"] == "tool")


def _calling(shown: Message) -> dict[str, Any]:
    """A conversation of tool calls, of which one is answered with images."""
    agent = AGENT.model_copy(update={"protocol": "tools"})
    found: Message = {"role": "tool", "content": shown["content"], "images": images_of(shown)}
    searching = prompts.search_message("Where is it?", "mass pump", agent)
    return {
        "question_id": "q",
        "prompt": [*prompts.prompt_messages("How heavy is the pump?", agent), searching, found],
        "completion": [searching],
        "tools": json.dumps(prompts.tool_definitions(agent)),
    }


def _adapter_of(part: config.Part, model: Path, folder: Path) -> artifact.Artifact:
    """A random adapter of one part, as it is stored."""
    from tasks.training.peft_model import store, with_adapter

    made = with_adapter(
        load_model(model, bf16=False), config.Finetune(parts=[part], lora_r=4), None, scalar=False, images=True
    )
    for name, parameter in made.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_()
    made.save_pretrained(folder, save_embedding_layers=False)
    store(folder, model.name, scalar=False)
    check_adapter(folder, model, config.Serve(tower_lora=True))
    return artifact.write_folder(folder, f"{folder}-stored", "adapter/1", 1, {})


def _wire(messages: list[Any], root: str) -> list[dict[str, Any]]:
    def url(image: Image) -> str:
        import base64

        data = storage.read_bytes(storage.join(root, image["key"]))
        return f"data:image/{image['key'].rpartition('.')[2]};base64,{base64.b64encode(data).decode()}"

    sent = [{**message, "content": openai_content(message, url)} for message in as_wire(messages)]
    return [{name: value for name, value in message.items() if name != "images"} for message in sent]


def _tokens(vllm: serve.Served, messages: list[Any], root: str, tools: str | None = None) -> list[int]:
    body = {"model": serve.BASE_NAME, "messages": _wire(messages, root)} | (
        {"tools": json.loads(tools)} if tools else {}
    )
    reply = httpx.post(vllm.base_url.removesuffix("/v1") + "/tokenize", json=body, timeout=120)
    return reply.raise_for_status().json()["tokens"]


def _log_probability(vllm: serve.Served, model: str, messages: list[Any], root: str) -> list[float]:
    """Of the most likely first tokens of an answer."""
    body = {"model": model, "messages": _wire(messages, root), "max_tokens": 1, "temperature": 0}
    body |= {"logprobs": True, "top_logprobs": 5}
    reply = httpx.post(vllm.base_url + "/chat/completions", json=body, timeout=120).raise_for_status().json()
    return [top["logprob"] for top in reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]]
