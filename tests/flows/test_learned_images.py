"""What is learned from conversations with page images is what the server was sent, image for image, through every stage."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from flows.collect import collect
from flows.mine import mine
from flows.prepare import prepare
from tasks import config, storage
from tasks.agent import prompts
from tasks.agent.message import Image, images_of, openai_content
from tasks.agent.protocol import as_wire
from tasks.artifact import read_rows
from tasks.refs import load_ref
from tests.model_server import ModelServer, Reply
from tests.small_collection import TOPICS, ingest_small

SELF_TEST = 4
FORMATS = ["sft_best", "sft_trajectory", "sft_context", "dpo", "reward"]


def _texts(request: dict[str, Any]) -> list[str]:
    """The texts of a request's messages, without images."""
    contents = [message["content"] or "" for message in request["messages"]]
    return [c if isinstance(c, str) else " ".join(part.get("text", "") for part in c) for c in contents]


def _topic(request: dict[str, Any]) -> str:
    asked = next(text for text in reversed(_texts(request)) if text.startswith("Question:"))
    return next((topic for topic in TOPICS if topic in asked), "lamp")


def _searching(request: dict[str, Any], query: str) -> Reply:
    if request.get("tools"):
        return Reply(None, tool_calls=[("search_documents", json.dumps({"query": query}))])
    return Reply(f"<search>{query}</search>")


def _asker(request: dict[str, Any], call: int) -> Reply:
    """Searches for the wrong page, then for the right one, and answers; of every other topic in vain before."""
    topic, tries = _topic(request), sum(message["role"] == "assistant" for message in request["messages"])
    tries += [*TOPICS, "lamp"].index(topic) % 2
    if tries == 3:
        answer = {"answer": ["7 kg"], "citations": []}
        called = Reply(None, tool_calls=[("provide_answer", json.dumps(answer))])
        return called if request.get("tools") else Reply("<answer>7 kg</answer>")
    return _searching(request, ["before use", f"read {topic}", f"mass {topic}"][tries])


def _sampler(request: dict[str, Any], call: int) -> Reply:
    """A query that depends on the seed."""
    topic = _topic(request)
    return _searching(request, [f"mass {topic}", f"read {topic}", "nothing here"][request["seed"] % 3])


def _sent(messages: list[Any], root: str) -> list[Any]:
    """Stored messages as a server gets them, without the ids of calls."""

    def url(image: Image) -> str:
        data = storage.read_bytes(storage.join(root, image["key"]))
        kind = "png" if image["key"].endswith("png") else "jpeg"
        return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"

    return [_without_ids({**message, "content": openai_content(message, url)}) for message in as_wire(messages)]


def _told(server: ModelServer) -> list[Any]:
    return [[_without_ids(message) for message in request["messages"]] for request in server.requests]


def _without_ids(message: dict[str, Any]) -> dict[str, Any]:
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    return {"role": message["role"], "content": message["content"]} | ({"calls": calls} if calls else {})


@pytest.mark.parametrize(("protocol", "context"), [("tags", 5400), ("tools", None)])
def test_what_is_learned_is_what_was_sent(tmp_path: Path, documents: Path, protocol: Any, context: int | None) -> None:
    """Also where the context is short, so that images of earlier turns gave way to text."""
    root = str(tmp_path / "store")
    agent = config.Agent(protocol=protocol, observation="image", top_k=2, max_iterations=5)
    sampling = config.Sampling(max_tokens=50)
    ingest_small(root, documents)
    with ModelServer(_asker) as server:
        server.max_model_len = context
        asked = config.Server(base_url=server.url, model="base")
        taken = config.Collect(split="all", limit=4)
        collect(config.CollectRun(storage=root, agent=agent, server=asked, sampling=sampling, collect=taken))
        told = _told(server)
        server.script = _sampler
        states = config.Mine(split="all", states="both", found=True, limit=4, samples=6)
        found, _ = mine(config.MineRun(storage=root, agent=agent, server=asked, sampling=sampling, mine=states))
        told_all = _told(server)
        assert server.refused == 0
    collected = read_rows(load_ref(root, "trajectories"))
    assert {row["outcome"] for row in collected} == {"answered"}
    replaced = [turn["images_replaced"] for row in collected for turn in row["turns"]]
    assert any(replaced) == (context is not None)
    prepare(
        config.PrepareRun(storage=root, source="both", agent=agent, format=config.Format(formats=FORMATS, split="all"))
    )
    questions = {row["question_id"]: row["question"] for row in collected}
    for state in read_rows(found.artifacts["states"]):
        if state["state"]:
            before = [*prompts.prompt_messages(questions[state["question_id"]], agent), *state["messages"]]
            assert _sent(before, root) in told
    shown = dict.fromkeys(FORMATS, 0)
    for name in FORMATS[:-1]:
        for row in read_rows(load_ref(root, name)):
            said = row.get("completion") or row["chosen"]
            for at in (at for at, message in enumerate(said) if message["role"] == "assistant"):
                before = [*row["prompt"], *said[:at]]
                assert _sent(before, root) in (told if name in ("sft_trajectory", "sft_context") else told_all), name
                shown[name] += sum(len(images_of(message)) for message in before)
    assert all(shown[name] for name in FORMATS[:-1])
    whole = {row["question_id"] for row in read_rows(load_ref(root, "sft_trajectory"))}
    in_sight = {row["question_id"] for row in collected if not any(turn["images_replaced"] for turn in row["turns"])}
    assert whole == in_sight
    assert {row["score"] for row in read_rows(load_ref(root, "reward"))} >= {0.0, 1.0}
