"""A chat message as it is stored, and the two forms that it is handed on in: OpenAI's, for servers, and TRL's, for training.

A message's content is one string. A page image stands in it as one U+FFFC (Unicode's object replacement character), and
`images` names the images in the order of these characters. No other text may hold one: `without_placeholders` takes them out
of what documents, questions and models say.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NotRequired, TypedDict

PLACEHOLDER = "\N{OBJECT REPLACEMENT CHARACTER}"
_PIECES = re.compile(f"({PLACEHOLDER})")


class Image(TypedDict):
    """A page's image: of which page, and where it lies below the storage root (tasks/images.py)."""

    file: str
    page: int  # from 1
    key: str
    width: int  # pixels
    height: int


class Message(TypedDict):
    """A chat message in the form that is stored and trained on. Without images, `images` is absent or null."""

    role: str
    content: str
    images: NotRequired[list[Image] | None]


def without_placeholders(text: str) -> str:
    """Text in which nothing can be taken for an image."""
    return text.replace(PLACEHOLDER, "")


def images_of(message: Mapping[str, Any]) -> list[Image]:
    """The images that a message shows, in their order."""
    return message.get("images") or []


def openai_content(message: Mapping[str, Any], url: Callable[[Image], str]) -> str | list[dict[str, Any]]:
    """The content as OpenAI-compatible servers take it: as it is, or in parts where there are images.

    Args:
        url: what the server gets an image by: a data, http(s) or file URL.
    """
    if not images_of(message):
        return message["content"]
    return [
        {"type": "text", "text": piece}
        if isinstance(piece, str)
        else {"type": "image_url", "image_url": {"url": url(piece)}}
        for piece in _pieces(message)
    ]


def chat_content(message: Mapping[str, Any]) -> str | list[dict[str, Any]]:
    """The content as transformers' chat templates and TRL take it; the images themselves go beside it, in `images_of` order."""
    if not images_of(message):
        return message["content"]
    return [
        {"type": "text", "text": piece} if isinstance(piece, str) else {"type": "image"} for piece in _pieces(message)
    ]


def scored_query(question: str, query: str) -> dict[str, list[Message]]:
    """What a reward model reads of a query: as prompt the question alone, as completion the query."""
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": query}],
    }


def _pieces(message: Mapping[str, Any]) -> Iterator[str | Image]:
    """Texts and images in turn; empty texts are left out."""
    images = iter(images_of(message))
    for piece in filter(None, _PIECES.split(message["content"])):
        yield next(images) if piece == PLACEHOLDER else piece
