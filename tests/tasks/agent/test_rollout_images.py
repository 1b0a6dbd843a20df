"""Rollouts that see page images: a server gets the images' real bytes over a socket, and never more than its context holds."""

import json
from pathlib import Path
from typing import Any

import pymupdf
import pytest

from tasks import artifact, config, documents, storage
from tasks.agent.client import open_client
from tasks.agent.message import PLACEHOLDER, images_of, openai_content
from tasks.agent.rollout import rollout, search_with
from tasks.agent.sampling import resolve
from tasks.agent.trajectory import Question, Trajectory, to_row
from tasks.images import PageImages
from tasks.pages import PageStore
from tasks.search.index import Searcher, build_index, open_index
from tests.model_server import ModelServer, Reply, received

FACTS = {"model": "base", "model_fingerprint": "m", "index_fingerprint": "i", "code_fingerprint": "c"}
WORDS = ["pump", "valve", "motor", "filter"]


class Library:
    """Manuals of real PDFs, one without; their index, and where images lie."""

    def __init__(self, folder: Path) -> None:
        self.root = str(folder / "storage")
        (folder / "pdfs").mkdir()
        for word in WORDS:
            pdf = pymupdf.open()
            for number in range(1, 3):
                page = pdf.new_page()
                for line in range(30):
                    page.insert_text(
                        (72, 72 + 20 * line), f"The {word} of page {number}, line {line}. Object {PLACEHOLDER}"
                    )
            pdf.save(folder / "pdfs" / f"{word}.pdf")
        settings = config.Ingest(documents=str(folder / "pdfs"), workers=1)
        read, _ = documents.read_documents(settings, f"{self.root}/read.parquet", f"{self.root}/aside.parquet")
        rows = artifact.read_rows(read)
        rows = [
            row | ({"source_uri": None, "source_sha256": None} if row["file"] == "filter.pdf" else {}) for row in rows
        ]
        rows = [{**row, "text": row["text"] + PLACEHOLDER} for row in rows]  # what OCR may bring
        table = artifact.table_of(rows, "pages/2")
        self.stored = artifact.write_table(table, f"{self.root}/pages.parquet", "pages/2", {})
        self.pages = PageStore(self.stored)
        self.searcher: Searcher = open_index(
            build_index(self.stored, config.Index(), f"{self.root}/index"), config.Search()
        )


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return Library(tmp_path_factory.mktemp("library"))


def searching(protocol: str) -> Any:
    """Searches for one word after the other, and then answers."""

    def script(request: dict[str, Any], call: int) -> Reply:
        done = sum(message["role"] == "assistant" for message in request["messages"])
        if protocol == "tools":
            name, arguments = "search_documents", {"query": f"{WORDS[min(done, 3)]}{PLACEHOLDER}"}
            if done == len(WORDS):
                name, arguments = "provide_answer", {"answer": ["42"], "citations": []}  # type: ignore[dict-item]
            return Reply(None, tool_calls=[(name, json.dumps(arguments))])
        word = f"<search>{WORDS[min(done, 3)]}{PLACEHOLDER}</search>"
        return Reply("<answer>42</answer>" if done == len(WORDS) else word)

    return script


async def run(library: Library, server: ModelServer, agent: config.Agent, **values: Any) -> Trajectory:
    asked = config.Server(base_url=server.url, model="base", image_token_side=32, **values)
    async with (
        PageImages(library.root, library.pages, agent, asked.send_images) as images,
        open_client(asked, images.url) as conversation,
    ):
        return await rollout(
            Question("q", f"What of it{PLACEHOLDER}?"),
            settings=agent,
            sampling=resolve("greedy", config.Sampling(max_tokens=50)),
            seed=0,
            complete=conversation(),
            search=search_with(library.searcher, agent.top_k),
            page_text=library.pages.text,
            page_image=images.image,
            deadline_s=60,
        )


def sent_parts(server: ModelServer) -> list[Any]:
    return [message["content"] for message in server.requests[-1]["messages"]]


@pytest.mark.parametrize("protocol", ["tags", "tools"])
@pytest.mark.parametrize("send", ["inline", "url"])
async def test_the_server_gets_the_pages_images_each_with_its_name(library: Library, protocol: Any, send: Any) -> None:
    agent = config.Agent(protocol=protocol, observation="image", top_k=2, max_iterations=6)
    with ModelServer(searching(protocol)) as server:
        trajectory = await run(library, server, agent, send_images=send)
    assert trajectory.outcome == "answered"
    assert [(t.images_shown, t.images_missing, t.images_replaced) for t in trajectory.turns] == [
        *[(2, 0, 0)] * 3,
        (0, 2, 0),  # no PDF: by its text
        (0, 0, 0),
    ]
    shown = [message for message in trajectory.messages if images_of(message)]
    assert len(shown) == 3
    for message in shown:
        assert message["content"].count(PLACEHOLDER) == 2
    # what is stored is what was sent last, but for the answer; images are their bytes
    stored = {
        image["key"]: storage.read_bytes(storage.join(library.root, image["key"]))
        for m in shown
        for image in images_of(m)
    }
    last = server.requests[-1]["messages"]
    expected = [openai_content(message, lambda image: image["key"]) for message in trajectory.messages[:-1]]
    for message, content in zip(last, expected, strict=True):
        if isinstance(content, str):
            assert (message["content"] or "") in content  # calls go beside it
            continue
        assert [part["type"] for part in message["content"]] == [part["type"] for part in content]
        for part, of in zip(message["content"], content, strict=True):
            if part["type"] == "text":
                assert part == of
            else:
                assert received(part["image_url"]["url"]) == stored[of["image_url"]["url"]]
    texts = [
        part["text"] for m in last if isinstance(m["content"], list) for part in m["content"] if part["type"] == "text"
    ]
    assert any(text.endswith("[1] pump.pdf page 1\n") or text.endswith("[1] pump.pdf page 2\n") for text in texts)
    assert "The filter of page" in str(sent_parts(server)[-1])
    assert PLACEHOLDER not in json.dumps(server.requests, ensure_ascii=False)
    row = to_row(trajectory, rollout_id="r", attempt=1, sample=0, **FACTS)
    uri = storage.join(library.root, f"{protocol}-{send}.parquet")
    read = artifact.read_rows(
        artifact.write_table(artifact.table_of([row], "trajectories/2"), uri, "trajectories/2", {})
    )
    assert [images_of(m) for m in read[0]["messages"]] == [images_of(m) for m in trajectory.messages]


@pytest.mark.parametrize("protocol", ["tags", "tools"])
@pytest.mark.parametrize("observation", ["image", "both"])
@pytest.mark.parametrize("length", [3000, 4500])
async def test_no_request_is_longer_than_the_context_and_the_oldest_images_give_way(
    library: Library, protocol: Any, observation: Any, length: int
) -> None:
    agent = config.Agent(protocol=protocol, observation=observation, top_k=2, max_iterations=6, max_page_chars=300)
    with ModelServer(searching(protocol)) as server:
        server.max_model_len = length
        trajectory = await run(library, server, agent)
    assert (trajectory.outcome, server.refused, server.calls) == ("answered", 0, 5)
    replaced = sum(turn.images_replaced for turn in trajectory.turns)
    left = [image for message in trajectory.messages for image in images_of(message)]
    assert replaced > 0
    assert replaced + len(left) == sum(turn.images_shown for turn in trajectory.turns) == 6
    assert [i["file"] for i in left] == ["pump.pdf", "pump.pdf", "valve.pdf", "valve.pdf", "motor.pdf", "motor.pdf"][
        replaced:
    ]
    images = [p for m in server.requests[-1]["messages"] if isinstance(m["content"], list) for p in m["content"]]
    assert sum(part["type"] == "image_url" for part in images) == len(left)
    stored = "\n".join(message["content"] for message in trajectory.messages)
    assert "The pump of page 1, line 0" in stored  # in place of the image, or beside it all along
    assert stored.count(PLACEHOLDER) == len(left)


async def test_what_does_not_fit_by_name_alone_ends_the_rollout_unsent(library: Library) -> None:
    agent = config.Agent(observation="image", top_k=2, max_iterations=6)
    with ModelServer(searching("tags")) as server:
        server.max_model_len = 420
        trajectory = await run(library, server, agent)
        assert (trajectory.status, trajectory.outcome, server.refused) == ("finished", "out_of_context", 0)
        assert "not sent" in (trajectory.failure_detail or "")
        server.max_model_len = 100
        trajectory = await run(library, server, agent)
        assert (trajectory.status, trajectory.outcome, server.refused) == ("failed", "http_status", 0)


async def test_images_stay_where_no_request_was_short_enough(library: Library) -> None:
    """What the model said, it said while they stood; no turn was taken behind what stands in their place."""
    from tests.model_server import Status

    def refusing(request: dict[str, Any], call: int) -> Reply | Status:
        spoken = sum(message["role"] == "assistant" for message in request["messages"])
        return searching("tags")(request, call) if spoken < 2 else Status(400, "the context length is exceeded")

    with ModelServer(refusing) as server:
        trajectory = await run(library, server, config.Agent(observation="image", top_k=2, max_iterations=6))
    assert (trajectory.outcome, len(trajectory.turns)) == ("out_of_context", 2)
    assert [turn.images_replaced for turn in trajectory.turns] == [0, 0]
    assert sum(len(images_of(message)) for message in trajectory.messages) == sum(
        turn.images_shown for turn in trajectory.turns
    )


async def test_a_server_that_says_no_length_is_believed_when_it_refuses(library: Library) -> None:
    from tests.model_server import Status, count_tokens

    def refusing(request: dict[str, Any], call: int) -> Reply | Status:
        if count_tokens(request) > 3000:
            return Status(400, "At most 2 image(s) may be provided in one prompt.")
        return searching("tags")(request, call)

    agent = config.Agent(observation="image", top_k=2, max_iterations=6, max_page_chars=300)
    with ModelServer(refusing) as server:
        trajectory = await run(library, server, agent)
    assert trajectory.outcome == "answered"
    assert sum(turn.images_replaced for turn in trajectory.turns) > 0
