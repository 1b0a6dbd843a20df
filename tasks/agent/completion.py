"""One model call: what it brings back, how it fails, and the type of the function that makes it."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tasks.agent.sampling import ResolvedSampling
from tasks.agent.trajectory import Failure


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool call that the server parsed out of the text. `arguments` is JSON as the server gave it, perhaps broken."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Completion:
    """What the model generated in one call, as the server reports it; nothing here is parsed by us yet.

    Of a stored text, which nobody generates now, nothing else is known.
    """

    raw_text: str  # without what the server took out of it: reasoning, tool calls
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    latency_s: float = 0.0  # with all tries


class CompletionError(Exception):
    """A model call failed for good, after the retries that made sense. A rollout records it and ends as failed."""

    def __init__(self, failure: Failure, detail: str, *, out_of_context: bool = False, refused: bool = False) -> None:
        super().__init__(f"{failure}: {detail}")
        self.failure, self.detail = failure, detail
        self.out_of_context = out_of_context  # the conversation no longer fits the model's context
        self.refused = refused  # the server did not like the request (HTTP 400), which may be put otherwise


Complete = Callable[[Sequence[Mapping[str, Any]], Mapping[str, Any], ResolvedSampling, int], Awaitable[Completion]]
"""(messages, images beside their texts; what the protocol adds to the request: tools, tool_choice, stop…; sampling; seed) →
completion.

Raises:
    CompletionError: no answer came; `out_of_context` where the messages do not fit, and fewer might.
"""

OpenConversation = Callable[[], Complete]
"""Gives a rollout a `Complete` of its own: its calls go to one server for as long as that server is well."""
