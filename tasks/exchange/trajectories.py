"""Rollouts of the reference pipeline, or of any other, as rows of trajectories.

A row is JSON of these fields; those in brackets may be missing:

    question_id, or id              text or whole number
    question                        text
    answer_locations, or evidence,  where the answer stands: [{"document", "page"}], {"file", "page_number"} or "file:page";
    or ground_truth                 one, or a list. Pages count from 1.
    searches                        what was searched, in order, each with
        query                       text
        results                     what came back, best first: {"file", "page_number", ["score"]}, or the names as above
        [reasoning, or thinking]    what the model thought before
        [rank, or gt_rank]          of the answer, and
        [rank_score]                (k − rank + 1)/k: both are found again in the results; a rank that is not there is noted
    [answer, or final_answer]       what the agent answered: a text, or a list of texts
    [citations]                     pages that the answer cites, named as above
    [answers, or answer_variants]   accepted answers, as in a file of questions (tasks/questions.py)
    [sampling_config, or sampling]  the name of a sampling configuration
    [top_k]                         pages that a search returned; else the agent's
    [split]                         train, dev or test; an ingested question has its own
    [category, model, sample, seed, rollout_id]
    [success, best_query, best_rank, first_rank, num_searches]  follow from the rest

What was said is not taken over, but told anew: the conversation is the one that an agent of these settings would have had
with the same searches and results, page texts or images and all. So the rollout can be learned from, whole, by that agent.

No image gives way to text, as how much context the model had is not known. A trainer sets aside what is longer than its
max_length.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from tasks import questions, records, reward
from tasks.agent import prompts
from tasks.agent.conversation import Conversation
from tasks.agent.message import Image
from tasks.agent.observation import PageText, as_read
from tasks.agent.protocol import Answer, Ask, Step, as_stored, clean, one_line, tell_last_turn
from tasks.agent.trajectory import Question, SearchRecord, Trajectory, Turn, to_row
from tasks.config import Agent
from tasks.exchange.rows import known_split
from tasks.reward import Page
from tasks.set_aside import Refused, printable

_DERIVED = {"rank", "gt_rank", "rank_score", "success", "best_query", "best_rank", "first_rank", "num_searches"}
_ALSO = {
    "question_id": ("question_id", "id"),
    "question": ("question",),
    "places": ("answer_locations", "evidence", "ground_truth"),
    "searches": ("searches",),
    "answer": ("answer", "final_answer"),
    "answers": ("answers", "answer_variants"),
    "citations": ("citations",),
    "reasoning": ("reasoning", "thinking"),
    "rank": ("rank", "gt_rank"),
    "results": ("results",),
    "query": ("query",),
    "sampling": ("sampling_config", "sampling"),
}
_PLAIN = {"split", "category", "model", "sample", "seed", "rollout_id", "top_k"}
_KNOWN = {name for names in _ALSO.values() for name in names} | _PLAIN | _DERIVED

PageImage = Callable[[str, int], Image | None]
"""(file, page number from 1) → the page's image; None where it is shown by its text. Asked by an agent that sees images."""

SplitOf = Callable[[str, str], str | None]
"""(id, text as the model is asked it) → the split of the ingested question that has either; None where none has."""


class Notes(NamedTuple):
    """What is found on the way: fields that nobody knows, and ranks that the results do not bear out."""

    unknown: Counter[str]
    differing: list[str]


def read(
    record: Mapping[str, Any],
    number: int,
    agent: Agent,
    page_text: PageText,
    page_image: PageImage,
    split_of: SplitOf,
    notes: Notes,
) -> dict[str, Any]:
    """One rollout as a row of trajectories.

    Args:
        number: of the row in its file; rows that are alike in all else are two rollouts.
        agent: whose conversation it becomes.
        page_text, page_image: of a page that a search found; they raise `Refused` for a page that is not known.
        split_of: of a question that is ingested; others are as the row says, else for training.

    Raises:
        Refused: why it cannot be used.
    """
    row = dict(record)
    notes.unknown.update(set(row) - _KNOWN)
    question_id = records.identifier(_get(row, "question_id"), "question_id")
    wanted = [questions.location_of(place) for place in _list(_get(row, "places"))]
    if not wanted:
        raise Refused("bad_location", "there is none")
    accepted = _get(row, "answers", optional=True)
    text = clean(records.text(_get(row, "question"), "question"))
    asked = str(prompts.question_message(text)["content"])
    question = Question(
        question_id,
        text,
        [] if accepted is None else questions.answers_of(accepted),
        wanted,
        _text(row, "category"),
        split_of(question_id, asked) or known_split(_text(row, "split")) or "train",
    )
    top_k = records.whole(row["top_k"], "top_k", least=1) if row.get("top_k") is not None else agent.top_k
    trajectory = Trajectory(
        question=question,
        protocol=agent.protocol,
        observation=agent.observation,
        top_k=top_k,
        sampling=_sampling(_get(row, "sampling", optional=True)),
        seed=_number(row, "seed"),
        sampling_fingerprint="",
        prompt_fingerprint=prompts.prompt_fingerprint(agent),
        tools=prompts.tools_json(agent),
        outcome="out_of_turns",
    )
    answer, made = _answer(row), _list(_get(row, "searches"))
    # where no answer follows the last search, it is not known whether the model saw what came back
    shown = len(made) if answer else len(made) - 1
    searches = [_search(item, wanted, top_k, notes, shown=at < shown) for at, item in enumerate(made)]
    _tell(trajectory, searches, answer, agent, page_text, page_image)
    digest = hashlib.sha256(f"{number}\0{json.dumps(row, sort_keys=True, default=str)}".encode()).hexdigest()
    return to_row(
        trajectory,
        rollout_id=_text(row, "rollout_id") or digest[:16],
        attempt=1,
        sample=_number(row, "sample"),
        model=_text(row, "model") or "unknown",
        model_fingerprint="",
        index_fingerprint="",
        code_fingerprint="",
    )


def _tell(
    trajectory: Trajectory,
    searches: list[tuple[str | None, SearchRecord]],
    answer: Answer | None,
    agent: Agent,
    page_text: PageText,
    page_image: PageImage,
) -> None:
    """Write turns and conversation as the agent loop would have."""
    protocol = prompts.PROTOCOLS[agent.protocol]
    conversation = Conversation(prompts.wire_prompt(trajectory.question.question, agent), agent, page_text)
    for at, (reasoning, search) in enumerate(searches):
        said = protocol.search(reasoning, search.query)
        calls = [call["id"] for call in said.get("tool_calls", ())]
        step = Step(as_stored(said)["content"], said, reasoning, (Ask(search.query, call_id=next(iter(calls), None)),))
        turn = _turn(at + 1, step, [search])
        conversation.add([said])
        if search.shown:
            images = [page_image(file, page) if agent.sees_images else None for _, file, page, _ in search.results]
            seen = as_read(search, agent, page_text, images)
            conversation.add(protocol.reply(step, [seen.text]), seen.images)
            turn = replace(turn, images_shown=len(seen.images), images_missing=seen.missing)
        trajectory.turns.append(turn)
    if answer is not None:
        if agent.answer and len(searches) + 1 == agent.max_iterations:
            tell_last_turn(conversation.messages, protocol)
        said = protocol.answer(None, answer)
        trajectory.turns.append(_turn(len(searches) + 1, Step(as_stored(said)["content"], said, None, (), answer), []))
        conversation.add([said])
        trajectory.outcome, trajectory.answer, trajectory.citations = "answered", answer.texts, answer.citations
    trajectory.messages = [as_stored(message) for message in conversation.messages]


def _turn(number: int, step: Step, searches: list[SearchRecord]) -> Turn:
    return Turn(number, step.raw_text, step.reasoning, step.action, searches)


def _search(item: Any, wanted: list[Page], top_k: int, notes: Notes, *, shown: bool) -> tuple[str | None, SearchRecord]:
    if not isinstance(item, dict):
        raise Refused("wrong_type", f"a search is a {type(item).__name__}, not an object")
    notes.unknown.update({f"searches.{name}" for name in set(item) - _KNOWN - {"turn", "searched", "read_as"}})
    query = one_line(records.text(_get(item, "query"), "query"))
    if not query:
        raise Refused("missing_field", "a search has no query")
    claimed = _get(item, "rank", optional=True)
    results = _list(_get(item, "results", optional=True))
    if claimed is not None and not results:
        raise Refused("missing_field", f"the search {printable(query)} has a rank, but no results")
    pages = [questions.location_of(result) for result in results][:top_k]
    rank = reward.gt_rank(pages, wanted)
    if claimed is not None and rank != records.whole(claimed, "rank"):
        notes.differing.append(f"{printable(query)}: {claimed}, in the results {rank or 'not there'}")
    scores = [result.get("score") if isinstance(result, dict) else None for result in results]
    hits = [
        (at, file, page, 0.0 if score is None else records.finite(score, "score"))
        for at, ((file, page), score) in enumerate(zip(pages, scores, strict=False), start=1)
    ]
    read_as = "words" if item.get("read_as") == "words" else "query"
    searched, score = clean(_text(item, "searched") or query), reward.rank_score(rank, top_k)
    record = SearchRecord(query, searched, read_as, hits, rank, score, shown)
    reasoning = _get(item, "reasoning", optional=True)
    return (clean(records.text(reasoning, "reasoning")).strip() or None) if reasoning is not None else None, record


def _answer(row: Mapping[str, Any]) -> Answer | None:
    given = _get(row, "answer", optional=True)
    texts = tuple(line for text in _list(given) if (line := one_line(records.text(text, "answer"))))
    cited = [questions.location_of(place) for place in _list(row.get("citations"))]
    return Answer(texts, tuple(dict.fromkeys((clean(file), page) for file, page in cited))) if texts else None


def _get(row: Mapping[str, Any], what: str, *, optional: bool = False) -> Any:
    names = _ALSO[what]
    if optional:
        return next((row[name] for name in names if row.get(name) is not None), None)
    return records.field(row, *names)


def _list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _text(row: Mapping[str, Any], name: str) -> str | None:
    return None if row.get(name) is None else records.text(row[name], name)


def _number(row: Mapping[str, Any], name: str) -> int:
    return 0 if row.get(name) is None else records.whole(row[name], name)


def _sampling(value: Any) -> Any:
    """A configuration's name, which the reference may write as {"name": …}."""
    named = value.get("name") if isinstance(value, dict) else value
    return records.text(named, "sampling_config") if named is not None else "default"
