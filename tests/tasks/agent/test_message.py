"""A stored message with images in the two forms that it is handed on in."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tasks.agent.message import (
    PLACEHOLDER,
    Image,
    Message,
    chat_content,
    images_of,
    openai_content,
    without_placeholders,
)

TEXTS = st.text(st.characters(codec="utf-8"), max_size=8).map(without_placeholders)


def image(n: int) -> Image:
    return Image(file=f"{n}.pdf", page=n + 1, key=f"k{n}", width=n + 10, height=n + 20)


@st.composite
def messages(draw: Any) -> Message:
    """Texts with an image between each two."""
    texts = draw(st.lists(TEXTS, min_size=1, max_size=6))
    message: Message = {"role": "user", "content": PLACEHOLDER.join(texts)}
    return message | {"images": [image(n) for n in range(len(texts) - 1)]} if len(texts) > 1 else message


@given(messages())
def test_both_forms_hold_the_same_text_and_the_same_images_in_the_same_places(message: Message) -> None:
    sent, trained = openai_content(message, lambda image: image["key"]), chat_content(message)
    if not images_of(message):
        assert sent == trained == message["content"]
        return
    assert isinstance(sent, list)
    assert isinstance(trained, list)
    assert [part["type"].removesuffix("_url") for part in sent] == [part["type"] for part in trained]
    assert "".join(part.get("text", PLACEHOLDER) for part in sent) == message["content"]
    assert "".join(part.get("text", PLACEHOLDER) for part in trained) == message["content"]
    assert [p["image_url"]["url"] for p in sent if p["type"] == "image_url"] == [i["key"] for i in images_of(message)]
    assert all(part["text"] for part in sent if part["type"] == "text")


def test_a_message_read_back_from_parquet_has_no_images_where_there_were_none() -> None:
    stored = {"role": "user", "content": "So?", "images": None}
    assert openai_content(stored, lambda image: image["key"]) == chat_content(stored) == "So?"
