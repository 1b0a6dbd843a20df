"""The record of one run of the agent, and its row in a trajectories artifact."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tasks.agent.message import Message, images_of
from tasks.reward import Page, pages_found, pages_wanted

Action = Literal["search", "answer", "none"]

Outcome = Literal["answered", "searched", "out_of_turns", "out_of_context"]
"""How a finished rollout ended; "searched" when no answer was asked for. Running it again would end the same way, so it is
kept as it is.
"""

Failure = Literal["connection", "deadline", "http_status", "server_error", "unreadable"]
"""Why a rollout failed, through no fault of the model; it may be run again.

connection: no connection, or it broke. deadline: the request's or the rollout's time was up. http_status: the server
refused the request (4xx, but for the three that follow), which the same request will not mend. server_error: it answered 5xx,
408, 409 or 429 to the last try, or with what is no completion. unreadable: a page that was to be shown could not be read: the
storage did not answer, or the document is gone.
"""

TurnFailure = Literal["unparsable_call", "unknown_tool", "bad_arguments", "empty_query", "no_action", "not_an_answer"]
"""Why a turn brought no valid action; the model is told, and the turn is spent.

unparsable_call: a call that is no JSON, or a tag without content that can be read. unknown_tool: a call to a tool that
does not exist. bad_arguments: JSON of another shape than the tool takes. empty_query: a search for nothing. no_action:
neither search nor answer. not_an_answer: a search in the last turn, which must answer.
"""


ReadBy = Literal["server", "parser", "reparse"]
"""Who read the action out of what the model wrote.

server: its tool parser, and we agree. parser: we, when the model wrote it. reparse: a later version of our parser
(tasks/reparse.py), which reads it otherwise than it was read then, so that the conversation goes on as if it were not.
"""


@dataclass(frozen=True, slots=True)
class Question:
    """A question with what is known about its answer."""

    question_id: str
    question: str
    answers: Sequence[Sequence[str]] = ()
    answer_locations: Sequence[Page] = ()  # (file, page number from 1)
    category: str | None = None
    split: str | None = None

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "Question":
        """A row of questions/1 as a question."""
        return cls(
            question_id=row["question_id"],
            question=row["question"],
            answers=row["answers"] or (),
            answer_locations=pages_wanted(row),
            category=row["category"],
            split=row["split"],
        )


@dataclass(frozen=True, slots=True)
class SearchRecord:
    """One search: what was asked, what was found, and where the answer stood in it."""

    query: str  # what the model asked for
    searched: str  # what the engine was given
    read_as: str  # "query" | "words"
    results: Sequence[tuple[int, str, int, float]]  # (rank from 1, file, page number from 1, score)
    gt_rank: int | None
    rank_score: float
    shown: bool  # the model saw what it found


@dataclass(frozen=True, slots=True)
class Turn:
    """One model call and what it led to."""

    turn: int  # from 1
    raw_text: str
    reasoning: str | None
    action: Action
    searches: Sequence[SearchRecord]
    failure: TurnFailure | None = None
    failure_detail: str | None = None
    read_by: ReadBy | None = None  # None where nothing could be read
    repaired: bool = False  # broken JSON of a call was mended (tasks/agent/calls.py)
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    latency_s: float = 0.0
    images_shown: int = 0  # pages that its searches found and whose images the model was then shown
    images_missing: int = 0  # pages that were shown by their text, as they cannot be rendered
    images_replaced: int = 0  # images of earlier turns that gave way to text before its request


@dataclass(slots=True)
class Trajectory:
    """The record of one run of the agent. It knows nothing of plans and attempts: `to_row` is told those."""

    question: Question
    protocol: str
    observation: str
    top_k: int
    sampling: str
    seed: int
    sampling_fingerprint: str
    prompt_fingerprint: str
    tools: str | None  # JSON
    state_messages: int = 0  # messages after the prompt that it was given to go on from
    status: Literal["finished", "failed"] = "finished"
    outcome: Outcome | Failure = "out_of_turns"
    failure_detail: str | None = None
    turns: list[Turn] = field(default_factory=list)
    answer: Sequence[str] = ()
    citations: Sequence[Page] = ()
    messages: list[Message] = field(default_factory=list)
    elapsed_s: float = 0.0


def to_row(
    trajectory: Trajectory,
    *,
    rollout_id: str,
    attempt: int,
    sample: int,
    model: str,
    model_fingerprint: str,
    index_fingerprint: str,
    code_fingerprint: str,
    state: str | None = None,
) -> dict[str, Any]:
    """A trajectory as a row of trajectories/2."""
    t, q = trajectory, trajectory.question
    turns = [_turn_row(turn) for turn in t.turns]
    return {
        "rollout_id": rollout_id,
        "attempt": attempt,
        "status": t.status,
        "outcome": t.outcome,
        "failure_detail": t.failure_detail,
        "question_id": q.question_id,
        "question": q.question,
        "answers": [list(answer) for answer in q.answers],
        "answer_locations": [{"document": document, "page": page} for document, page in q.answer_locations],
        "category": q.category,
        "split": q.split,
        "state": state,
        "state_messages": t.state_messages,
        "model": model,
        "protocol": t.protocol,
        "observation": t.observation,
        "sampling": t.sampling,
        "sample": sample,
        "seed": t.seed,
        "top_k": t.top_k,
        "turns": turns,
        "answer": list(t.answer),
        "citations": cited(t.citations, turns, t.state_messages),
        "messages": t.messages,
        "tools": t.tools,
        "prompt_tokens": tokens(turn.prompt_tokens for turn in t.turns),
        "completion_tokens": tokens(turn.completion_tokens for turn in t.turns),
        "elapsed_s": t.elapsed_s,
        "model_fingerprint": model_fingerprint,
        "sampling_fingerprint": t.sampling_fingerprint,
        "prompt_fingerprint": t.prompt_fingerprint,
        "index_fingerprint": index_fingerprint,
        "code_fingerprint": code_fingerprint,
    }


def tokens(of_turns: Iterable[int | None]) -> int | None:
    """Tokens of all turns; None where the server did not tell those of one, as a sum of the others would pass for all."""
    total = 0
    for told in of_turns:
        if told is None:
            return None
        total += told
    return total


def _turn_row(turn: Turn) -> dict[str, Any]:
    names = Turn.__slots__
    row = {name: getattr(turn, name) for name in names}
    row["searches"] = [search_row(search) for search in turn.searches]
    return row


def cited(citations: Iterable[Page], turns: Iterable[Mapping[str, Any]], state_messages: int) -> list[dict[str, Any]]:
    """The citations of a row whose turns are `turns`: each with whether a search had shown the model its page."""
    shown = [search for turn in turns for search in turn["searches"] if search["shown"]]
    seen = {page for search in shown for page in pages_found(search)}
    # the pages of a stored conversation are not told apart from its other words
    return [
        {"file": file, "page": page, "seen": None if state_messages else (file, page) in seen}
        for file, page in citations
    ]


def turn_messages(roles: Iterable[str], turns: int) -> list[int]:
    """Indices of the messages of so many turns, each of which adds one of the assistant: its last ones, for those before are of
    the conversation gone on from, and worked examples of the prompt.

    Args:
        roles: of all messages of a conversation.
    """
    spoken = [at for at, role in enumerate(roles) if role == "assistant"]
    return spoken[max(0, len(spoken) - turns) :]


def as_answered(turns: Sequence[Mapping[str, Any]], messages: Sequence[Mapping[str, Any]]) -> int:
    """Index of the message from which on the model wrote each behind the very messages that are stored before it.

    What it wrote earlier it wrote when images were still shown that have given way to text since.

    Args:
        turns: of a row of trajectories.
    """
    changed = [at for at, turn in enumerate(turns) if turn["images_replaced"]]
    if not changed:
        return 0
    spoken = turn_messages((message["role"] for message in messages), len(turns))
    last = spoken[changed[-1]]
    # once no image is left, texts that stand for images go as well, and no turn says so
    return last if any(images_of(message) for message in messages[:last]) else spoken[-1]


def search_row(search: SearchRecord) -> dict[str, Any]:
    """A search as it stands in a row."""
    row = {name: getattr(search, name) for name in ("query", "searched", "read_as", "gt_rank", "rank_score", "shown")}
    row["results"] = [
        {"rank": rank, "file": file, "page_number": page, "score": score} for rank, file, page, score in search.results
    ]
    return row
