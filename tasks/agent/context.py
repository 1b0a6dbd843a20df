"""How many tokens a request takes, so that none is sent that is longer than the model's context.

A conversation mostly grows, and the server says with each answer how many tokens it has come to. What is new is counted by
what it can be at most: a text's bytes, as no token of a byte-level vocabulary is shorter, and an image's squares. Only where
that might not fit is the server asked to tokenize (vLLM's /tokenize). Where it cannot, a text is reckoned at a token for every
two letters, for each space and for every byte of anything else: prose at two to three times what it has, figures, of which
each digit is a token in Qwen's vocabularies and SmolLM2's, at what they have.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tasks.agent.message import PLACEHOLDER, Image, images_of, without_placeholders
from tasks.agent.protocol import as_stored

_LETTERS, _SPACES = re.compile(r"[^\W\d_]+"), re.compile(r"\s+")
_LETTER_BYTES = 2  # that make a token
_A_MESSAGE = 16  # tokens around a message: its role, its ends
_A_PROMPT = 64  # before the first message and after the last
_TOOLS = 512  # how a template introduces tools
# What Qwen3-VL's processor leaves an image as it is within. Qwen2.5-VL's bounds, 56 * 56 and 16384 * 28 * 28, are lower, so
# that no image has more tokens there.
_MIN_PIXELS, _MAX_PIXELS = 256 * 256, 4096 * 4096

Message = Mapping[str, Any]


def image_tokens(image: Image, side: int) -> int:
    """Tokens of an image in Qwen3-VL, and at most in Qwen2.5-VL: a token a square, and the two tokens that enclose it.

    Sides are first rounded to whole squares, as in `smart_resize` of transformers' Qwen2VLImageProcessor, which both use.

    Args:
        side: of a square, in pixels: the vision tower's patch size times its merge size.
    """
    width, height = image["width"], image["height"]
    down, across = round(height / side), round(width / side)
    if down * across * side**2 > _MAX_PIXELS:
        shrink = math.sqrt(height * width / _MAX_PIXELS)
        down, across = (max(1, math.floor(n / shrink / side)) for n in (height, width))
    elif down * across * side**2 < _MIN_PIXELS:
        grow = math.sqrt(_MIN_PIXELS / (height * width))
        down, across = (math.ceil(n * grow / side) for n in (height, width))
    return down * across + 2


class TokenCount:
    """Counts the tokens of one conversation's requests."""

    def __init__(self, side: int) -> None:
        self._side = side
        self._counted: Sequence[Message] = ()  # the messages that `_tokens` are known of
        self._tokens = 0
        self._answer = 0  # tokens of the answer to them, which becomes the next message

    def at_most(self, messages: Sequence[Message], tools: object) -> int:
        """No fewer tokens than the request has."""
        return self._reckon(messages, tools, _bytes)

    def about(self, messages: Sequence[Message], tools: object) -> int:
        """About the tokens that the request has."""
        return self._reckon(messages, tools, _about)

    def learn(self, messages: Sequence[Message], tokens: int | None, answer: int | None = None) -> None:
        """A server has counted: the request had `tokens`, and the answer that it led to had `answer`."""
        if tokens is not None:
            self._counted, self._tokens, self._answer = tuple(messages), tokens, answer or 0

    def images(self, messages: Sequence[Message]) -> int:
        """Tokens of all images of a request."""
        return sum(image_tokens(image, self._side) for message in messages for image in images_of(message))

    def _reckon(self, messages: Sequence[Message], tools: object, size: Callable[[str], int]) -> int:
        new, tokens = messages, _A_PROMPT
        n = len(self._counted)
        if n and len(messages) >= n and all(a is b for a, b in zip(messages, self._counted, strict=False)):
            new, tokens = messages[n:], self._tokens
            if self._answer and new:
                new, tokens = new[1:], tokens + self._answer + _A_MESSAGE
        elif tools:
            tokens += _TOOLS + size(json.dumps(tools))
        texts = (without_placeholders(as_stored(message)["content"]) for message in new)
        return tokens + self.images(new) + sum(_A_MESSAGE + size(text) for text in texts)


def _bytes(text: str) -> int:
    return len(text.encode())


def _about(text: str) -> int:
    letters, spaces = "".join(_LETTERS.findall(text)), len(_SPACES.findall(text))
    rest = _SPACES.sub("", _LETTERS.sub("", text))
    return math.ceil(_bytes(letters) / _LETTER_BYTES) + spaces + _bytes(rest)


def text_alone(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages without their images, for a server to tokenize."""
    return [
        {**{k: v for k, v in message.items() if k != "images"}, "content": message["content"].replace(PLACEHOLDER, "")}
        for message in messages
    ]
