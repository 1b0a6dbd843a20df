"""Tokens are never counted too low by the bound, images exactly as Qwen3-VL's processor does, and what gives way leaves names."""

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from tasks import config
from tasks.agent.context import TokenCount, image_tokens, text_alone
from tasks.agent.conversation import Conversation
from tasks.agent.message import PLACEHOLDER, Image, images_of
from tasks.agent.observation import observe
from tasks.agent.trajectory import SearchRecord


def image(width: int = 843, height: int = 1192, page: int = 1) -> Image:
    return Image(file="a.pdf", page=page, key=f"{page}", width=width, height=height)


@given(st.integers(20, 6000), st.integers(20, 6000), st.sampled_from([28, 32]))
def test_an_image_has_the_tokens_that_qwens_processor_makes_of_it(width: int, height: int, side: int) -> None:
    if max(width, height) > 200 * min(width, height):
        return

    def processed(min_pixels: int, max_pixels: int) -> int:
        down, across = smart_resize(height, width, side, min_pixels=min_pixels, max_pixels=max_pixels)
        return (down // side) * (across // side) + 2

    found = image_tokens(image(width, height), side)
    assert found == processed(65_536, 16_777_216)  # as Qwen3-VL's preprocessor_config.json says
    assert found >= processed(56 * 56, 16384 * 28 * 28)  # Qwen2.5-VL's


MESSAGES = st.lists(
    st.builds(
        lambda role, texts: (
            {"role": role, "content": PLACEHOLDER.join(texts)}
            | ({"images": [image(page=n) for n in range(1, len(texts))]} if len(texts) > 1 else {})
        ),
        st.sampled_from(["user", "tool", "assistant"]),
        st.lists(
            st.text(st.characters(codec="utf-8", exclude_characters=PLACEHOLDER), max_size=30), min_size=1, max_size=3
        ),
    ),
    min_size=2,
    max_size=8,
)


def real_tokens(messages: Any) -> int:
    """The worst vocabulary: each byte a token."""
    return sum(len(m["content"].replace(PLACEHOLDER, "").encode()) + 10 for m in messages) + sum(
        image_tokens(i, 32) for m in messages for i in images_of(m)
    )


@given(MESSAGES, st.data())
def test_the_bound_is_never_below_what_a_server_counts(messages: Any, data: Any) -> None:
    count = TokenCount(32)
    assert count.at_most(messages, None) >= real_tokens(messages)
    sent = data.draw(st.integers(1, len(messages) - 1))
    answer = messages[sent]
    # the server counted the first messages, and what it then generated is the next one
    count.learn(messages[:sent], real_tokens(messages[:sent]), real_tokens([answer]))
    assert real_tokens(messages) <= count.at_most(messages, None) <= real_tokens(messages) + 100 * len(messages)
    changed = [copy.copy(messages[0]), *messages[1:]]  # another message in the first's place: nothing is known any more
    assert count.at_most(changed, None) == TokenCount(32).at_most(changed, None)
    assert count.about(messages, None) <= count.at_most(messages, None)
    assert all("images" not in m and PLACEHOLDER not in m["content"] for m in text_alone(messages))


def reckoned(text: str) -> int:
    """Tokens that a message's text is taken for where no server counts them."""
    empty, told = ([{"role": "user", "content": content}] for content in ("", text))
    return TokenCount(32).about(told, None) - TokenCount(32).about(empty, None)


@given(st.text("0123456789.,|()%- \n"))
def test_where_no_server_counts_each_figure_is_a_token(text: str) -> None:
    """As in the vocabularies of Qwen and SmolLM2, which split numbers into digits."""
    assert len("".join(text.split())) <= reckoned(text) <= len(text)


def test_where_no_server_counts_prose_is_reckoned_at_less_than_its_bytes() -> None:
    prose = "The warranty of the pump ends after twenty-four months, unless the buyer has agreed otherwise. " * 20
    assert len(prose.split()) * 2 < reckoned(prose) < len(prose) * 2 / 3


PAGES = {("a.pdf", 1): "One\nfish", ("a.pdf", 2): "", ("b.pdf", 3): "[1] a.pdf page 1", ("c.pdf", 4): "page 4"}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from(sorted(PAGES)), max_size=4), min_size=1, max_size=4),
    st.sampled_from(["image", "both"]),
    st.sets(st.sampled_from(sorted(PAGES))),
)
async def test_images_give_way_oldest_first_to_text_and_then_to_names(
    searches: list[list[tuple[str, int]]], observation: Any, without: set[tuple[str, int]]
) -> None:
    agent = config.Agent(observation=observation)

    async def page_image(file: str, page: int) -> Image | None:
        return None if (file, page) in without else {**image(page=page), "file": file}

    def page_text(file: str, page: int) -> str:
        return PAGES[file, page]

    conversation = Conversation([{"role": "user", "content": "Question: So?"}], agent, page_text)
    shown: list[tuple[str, int]] = []
    for found in searches:
        record = SearchRecord("q", "q", "query", [(n, f, p, 1.0) for n, (f, p) in enumerate(found, 1)], None, 0.0, True)
        seen = await observe(record, agent, page_text, page_image)
        assert (len(seen.images), seen.missing) == (
            sum(p not in without for p in found),
            sum(p in without for p in found),
        )
        conversation.add([{"role": "user", "content": seen.text}], seen.images)
        shown += [place for place in found if place not in without]
    first = conversation.messages[1]
    for at, (file, page) in enumerate(shown):
        left = [(i["file"], i["page"]) for m in conversation.messages for i in images_of(m)]
        assert left == shown[at:]
        assert all(m["content"].count(PLACEHOLDER) == len(images_of(m)) for m in conversation.messages)
        assert conversation.give_way() == 1
        assert (file, page) == shown[at]
    whole = "\n".join(m["content"] for m in conversation.messages)
    assert PLACEHOLDER not in whole
    taken = [conversation.give_way() for _ in range(len(shown) + 1)]
    texts = sum(bool(PAGES[place]) for place in shown) if observation == "image" else 0
    assert taken == [0] * texts + [None] * (len(shown) + 1 - texts)
    for message, found in zip(conversation.messages[1:], searches, strict=True):
        for n, (file, page) in enumerate(found, 1):
            assert f"[{n}] {file} page {page}\n" in message["content"]  # names stay
    assert first["content"].count(PLACEHOLDER) == len(images_of(first))  # a message that was sent is never changed


async def test_without_images_there_is_nothing_to_show_them_by() -> None:
    from tasks.errors import ConfigError

    record = SearchRecord("q", "q", "query", [(1, "a.pdf", 1, 1.0)], None, 0.0, True)
    with pytest.raises(ConfigError, match="page images"):
        await observe(record, config.Agent(observation="image"), lambda file, page: "", None)
