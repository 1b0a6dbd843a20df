"""Conversations → token sequences, which of their tokens are learned, and what is learned together.

The text of a sequence is what serving would produce, byte for byte: the chat template's prompt (with the tools, ending in
the generation prompt), the assistant's raw text (behind a prompt that opens the thought, without the tag that opens it), the
end-of-turn token. A template may render a conversation's earlier turns
otherwise than it did when they were generated (Qwen3 drops their reasoning, say); the row then becomes several sequences,
one for each such turn, so that every turn is learned behind the very prompt that it will be asked with.

Each piece (prompt, turn, what comes between two turns) is tokenized by itself, as a server does: the prompt's tokens do not
depend on the answer.

What each mask strategy learns, of the assistant turns of the completion:

    none         every token, the prompt's too
    assistant    the whole turn, and its end
    search-think turns that search: the reasoning and the search call
    search-only  turns that search: the search call alone

A search call is learned with its opening and closing tags (`<search>…</search>`, or `<tool_call>{"name": "search_documents",
…}</tool_call>`): without the opening one a model need not ever search, without the closing one it need not ever stop. When
nothing but white space follows the call, the end of the turn is learned too. Prompts, observations and tool results are
learned under `none` alone.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tasks.agent.message import chat_content, images_of
from tasks.training.sight import Sight

Span = tuple[int, int]
Row = Mapping[str, Any]

_SEARCH = re.compile(
    r'<search>.*?</\s*search\s*>|<tool_call>\s*\{[^{}]*"name"\s*:\s*"search_documents".*?</tool_call>',
    re.DOTALL | re.IGNORECASE,
)
_REASONING = re.compile(r"\A.*?</think>\s*", re.DOTALL)  # a template may have opened the <think> itself


@dataclass(frozen=True)
class Example:
    """One token sequence. `targets` are the positions, from 1, of the tokens that are learned; `weight` scales its loss.

    Tokens of images are negative, see tasks/training/sight.py.
    """

    ids: tuple[int, ...]
    targets: tuple[int, ...]
    weight: float = 1.0


@dataclass(frozen=True)
class Pair:
    """Two examples of an item, by index: `better` scored higher than `worse`, by `gap`; `weight` scales the pair's loss."""

    better: int
    worse: int
    gap: float
    weight: float = 1.0


@dataclass(frozen=True)
class Item:
    """What goes into a batch together: one example, or several behind the same prompt.

    Attributes:
        examples: its token sequences.
        pairs: which of them are compared, if any.
        scores: rank score of each of them, where it is learned.
    """

    examples: tuple[Example, ...]
    pairs: tuple[Pair, ...] = ()
    scores: tuple[float, ...] = ()

    @property
    def count(self) -> int:
        """What it counts as in what is told: its pairs, else its examples."""
        return len(self.pairs) or len(self.examples)


@dataclass(frozen=True)
class Items:
    """A training set as items: to learn from, to measure on, and how many rows or sequences were set aside why."""

    train: list[Item]
    val: list[Item]
    set_aside: dict[str, int]


MISTAKABLE = "a text holds an image's token"


def unusable(example: Example, max_length: int) -> str | None:
    """Why an example is set aside, whole: it is never cut."""
    if len(example.ids) > max_length:
        return "too long"
    return None if example.targets else "nothing to learn"


def encode(row: Row, tokenizer: Any, strategy: str, weight: float = 1.0, sight: Sight | None = None) -> list[Example]:
    """The token sequences of one row, each ending with an assistant turn.

    Args:
        row: with prompt, completion and tools, as sft/2 has them.
        tokenizer: a fast tokenizer with a chat template.
        strategy: a mask strategy, see the module's docstring.
        sight: what the model makes of the images that the row shows; needed where it shows any.
            No text of the row is `mistakable`.
    """
    examples = []
    images = [image for message in [*row["prompt"], *row["completion"]] for image in images_of(message)]
    for pieces in sequences(row, tokenizer):
        encoded = tokenizer(pieces, add_special_tokens=False, return_offsets_mapping=True)
        ids: list[int] = []
        learned: list[int] = []
        for index, (piece, piece_ids) in enumerate(zip(pieces, encoded["input_ids"], strict=True)):
            if strategy == "none":
                spans = [(0, len(piece))]
            elif index % 2:
                spans = learned_spans(piece, len(piece) - len(tokenizer.eos_token), strategy)
            else:
                spans = []
            learned += [len(ids) + i for i in _overlapping(encoded["offset_mapping"][index], spans)]
            ids += piece_ids
        if sight:
            ids, learned = _with_images(ids, learned, [sight.tokens(image) for image in images], sight.token_id)
        # the first token follows nothing, so nothing predicts it
        examples.append(Example(tuple(ids), tuple(i for i in learned if i > 0), weight))
    return examples


def mistakable(messages: Iterable[Mapping[str, Any]], tokenizer: Any, sight: Sight | None) -> bool:
    """Whether a text holds the token that the model reads as an image, as a page about the model may. Its row is set aside."""
    if sight is None:
        return False
    token = tokenizer.convert_ids_to_tokens(sight.token_id)
    return any(token in message["content"] for message in messages)


def _with_images(
    ids: Sequence[int], learned: Sequence[int], images: Sequence[Sequence[int]], token_id: int
) -> tuple[list[int], list[int]]:
    """Put the tokens of each image in the place of the one that stands for it; a sequence may end before the last image."""
    expanded: list[int] = []
    moved: list[int] = []
    left = list(images)
    for token in ids:
        moved.append(len(expanded))
        if token != token_id:
            expanded.append(token)
        else:
            expanded += left.pop(0)
    return expanded, [moved[at] for at in learned]


def sequences(row: Row, tokenizer: Any) -> list[list[str]]:
    """The texts of one row's sequences, each in pieces: prompt, turn, what comes between, turn, …

    A turn is the assistant's raw text and the end-of-turn token.
    """
    tools = json.loads(row["tools"]) if row["tools"] else None
    messages = [_chat(message) for message in row["prompt"]]
    found: list[list[str]] = []
    for message in row["completion"]:
        if message["role"] == "assistant":
            prompt = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
            before = "".join(found[-1]) if found else None
            turn = _said_behind(prompt, message["content"]) + tokenizer.eos_token
            if before is not None and prompt.startswith(before):
                found[-1] += [prompt[len(before) :], turn]
            else:
                found.append([prompt, turn])
        messages.append(_chat(message))
    return found


def _said_behind(prompt: str, content: str) -> str:
    """What the model says behind a prompt, of a turn as it is stored.

    Where the prompt has opened the thought (Qwen's Thinking models), the turn goes on as their template writes it: without the
    opening tag, with a blank line behind the closing one, which comes at once when there is no thought.
    """
    if not prompt.rstrip().endswith("<think>"):
        return content
    thought, closed, rest = content.partition("</think>")
    if not closed and not content.startswith("<think>"):
        thought, rest = "", content
    thought = thought.removeprefix("<think>").strip()
    cut_off = not closed and not rest
    return thought if cut_off else f"{thought}\n</think>\n\n" + rest.lstrip("\n")


def _chat(message: Mapping[str, Any]) -> dict[str, Any]:
    return {"role": message["role"], "content": chat_content(message)}


def learned_spans(turn: str, end: int, strategy: str) -> list[Span]:
    """The characters of an assistant turn that are learned.

    Args:
        turn: its raw text and the end-of-turn token.
        end: where the raw text ends.
        strategy: "assistant", "search-think" or "search-only".
    """
    if strategy == "assistant":
        return [(0, len(turn))]
    reasoning = _REASONING.match(turn)
    start = reasoning.end() if reasoning else 0
    searches = [match.span() for match in _SEARCH.finditer(turn, start, end)]
    if not searches:
        return []
    if not turn[searches[-1][1] : end].strip():
        searches[-1] = (searches[-1][0], len(turn))
    return [(0, start), *searches] if strategy == "search-think" and start else searches


def _overlapping(offsets: Sequence[Span], spans: Sequence[Span]) -> list[int]:
    """Indexes of the tokens that hold a character of any span."""
    return [i for i, (a, b) in enumerate(offsets) if any(a < end and start < b for start, end in spans)]
