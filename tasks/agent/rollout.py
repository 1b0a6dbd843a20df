"""The one agent loop: a model is asked, searches, sees results, and answers.

Collection, evaluation and the interactive test call `rollout` with other settings, never with another loop.
"""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tasks import reward
from tasks.agent.completion import Complete, Completion, CompletionError
from tasks.agent.conversation import Conversation
from tasks.agent.message import Image, Message
from tasks.agent.observation import PageImage, PageText, observe
from tasks.agent.prompts import PROTOCOLS, prompt_fingerprint, tools_json, wire_prompt
from tasks.agent.protocol import Actions, Step, as_stored, as_wire, tell_last_turn
from tasks.agent.sampling import ResolvedSampling, sampling_fingerprint
from tasks.agent.trajectory import Action, Question, SearchRecord, Trajectory, Turn, TurnFailure
from tasks.config import Agent
from tasks.errors import ArtifactError, InputError, StorageError
from tasks.reward import Page
from tasks.search.index import Searcher, SearchResult

Search = Callable[[str, str], SearchResult | Awaitable[SearchResult]]
"""(query, question) → what was found, best first, at most `top_k` pages."""


def search_with(searcher: Searcher, top_k: int) -> Search:
    """A rollout's way to search an open index: in a thread where the query would hold up the other rollouts."""

    def search(query: str, question: str) -> SearchResult | Awaitable[SearchResult]:
        if searcher.holds_up(query):
            return asyncio.to_thread(searcher.search, query, top_k, question)
        return searcher.search(query, top_k, question)

    return search


async def rollout(
    question: Question,
    *,
    settings: Agent,
    sampling: ResolvedSampling,
    seed: int,
    complete: Complete,
    search: Search,
    page_text: PageText,
    deadline_s: float,
    page_image: PageImage | None = None,
    earlier: Sequence[Message] = (),
    on_turn: Callable[[Turn], None] | None = None,
) -> Trajectory:
    """One run of the agent on one question, at most `settings.max_iterations` model calls.

    What goes wrong with server or network ends the run as "failed" with its reason, and what was done until then is
    kept. What the model does wrong costs it the turn. Anything else is a mistake in this program, and is raised.

    Args:
        complete: asks the model, see `client.open_client`.
        search: see `search_with`.
        deadline_s: seconds that the whole run may take.
        page_image: see `images.PageImages`; needed where the observation shows images.
        earlier: messages of a stored conversation after its prompt; the model goes on from there.
        on_turn: is told each turn as it ends.
    """
    trajectory = Trajectory(
        question=question,
        protocol=settings.protocol,
        observation=settings.observation,
        top_k=settings.top_k,
        sampling=sampling.name,
        seed=seed,
        sampling_fingerprint=sampling_fingerprint(sampling),
        prompt_fingerprint=prompt_fingerprint(settings),
        tools=tools_json(settings),
        outcome="out_of_turns" if settings.answer else "searched",
        state_messages=len(earlier),
    )
    prompt = [*wire_prompt(question.question, settings), *as_wire(earlier)]
    conversation = Conversation(prompt, settings, page_text)
    start = time.perf_counter()
    deadline = asyncio.timeout(deadline_s)
    try:
        async with deadline:
            await _converse(
                trajectory, conversation, settings, sampling, complete, search, page_text, page_image, on_turn
            )
    except TimeoutError:
        if not deadline.expired():
            raise
        _fail(trajectory, CompletionError("deadline", f"the rollout took longer than {deadline_s:g} s"))
    except CompletionError as error:
        _fail(trajectory, error)
    except (StorageError, ArtifactError, InputError) as error:
        _fail(trajectory, CompletionError("unreadable", str(error)))
    trajectory.elapsed_s = time.perf_counter() - start
    trajectory.messages = [as_stored(message) for message in conversation.messages]
    return trajectory


def _fail(trajectory: Trajectory, error: CompletionError) -> None:
    trajectory.failure_detail = error.detail
    if error.out_of_context and (trajectory.turns or trajectory.state_messages):
        trajectory.outcome = "out_of_context"  # it would not fit the next time either
    else:
        trajectory.status, trajectory.outcome = "failed", error.failure


async def _converse(
    trajectory: Trajectory,
    conversation: Conversation,
    settings: Agent,
    sampling: ResolvedSampling,
    complete: Complete,
    search: Search,
    page_text: PageText,
    page_image: PageImage | None,
    on_turn: Callable[[Turn], None] | None,
) -> None:
    """Take turns until the model answers or has none left; extends the trajectory and the conversation as it goes."""
    protocol = PROTOCOLS[settings.protocol]
    for number in range(1, settings.max_iterations + 1):
        goes_on = number < settings.max_iterations
        last = settings.answer and not goes_on
        if last:
            tell_last_turn(conversation.messages, protocol)
        options = protocol.options(allowed_actions(settings, last), settings.guided)
        completion, replaced = await _ask(conversation, complete, options, sampling, trajectory.seed)
        step = protocol.parse(completion)
        searches: list[SearchRecord] = []
        texts: list[str] = []
        images: list[Image] = []
        missing = 0
        for ask in () if last or step.answer else step.asks:
            if ask.query is None:
                texts.append(f"Error: {ask.detail}.")
            else:
                record = await _search(ask.query, trajectory.question, settings.top_k, search, shown=goes_on)
                searches.append(record)
                if goes_on:
                    seen = await observe(record, settings, page_text, page_image)
                    texts.append(seen.text)
                    images += seen.images
                    missing += seen.missing
        turn = _turn(number, completion, step, searches, last)
        trajectory.turns.append(
            replace(turn, images_shown=len(images), images_missing=missing, images_replaced=replaced)
        )
        if on_turn:
            on_turn(trajectory.turns[-1])
        conversation.add([step.message])
        if step.answer is not None:
            trajectory.outcome = "answered"
            trajectory.answer, trajectory.citations = step.answer.texts, step.answer.citations
            return
        if goes_on:
            conversation.add(protocol.reply(step, texts), images)


async def _ask(
    conversation: Conversation,
    complete: Complete,
    options: Mapping[str, Any],
    sampling: ResolvedSampling,
    seed: int,
) -> tuple[Completion, int]:
    """A completion, and how many images gave way so that the conversation fits the model's context.

    Where there is none, nothing gave way: what was said before was said with all that was shown then. Servers and chat
    templates that refuse several calls in a message get all calls as text from then on.
    """
    replaced, before = 0, list(conversation.messages)
    while True:
        try:
            return await complete(list(conversation.messages), options, sampling, seed), replaced
        except CompletionError as error:
            if error.out_of_context and (taken := conversation.give_way()) is not None:
                replaced += taken
            elif error.refused and any(len(m.get("tool_calls", ())) > 1 for m in conversation.messages):
                conversation.messages = [{**as_stored(m)} if "tool_calls" in m else m for m in conversation.messages]
            else:
                conversation.messages = before
                raise


async def _search(query: str, question: Question, top_k: int, search: Search, shown: bool) -> SearchRecord:
    found = search(query, question.question)
    result = await found if inspect.isawaitable(found) else found
    return search_record(query, result, question.answer_locations, top_k, shown)


def search_record(query: str, result: SearchResult, wanted: Sequence[Page], top_k: int, shown: bool) -> SearchRecord:
    """What a search for `query` found, as it is recorded.

    Args:
        wanted: the question's answer locations.
        shown: whether the model saw it.
    """
    rank = reward.gt_rank([(hit.file, hit.page_number) for hit in result.hits], wanted)
    return SearchRecord(
        query=query,
        searched=result.searched,
        read_as=result.read_as,
        results=[(hit.rank, hit.file, hit.page_number, hit.score) for hit in result.hits],
        gt_rank=rank,
        rank_score=reward.rank_score(rank, top_k),
        shown=shown,
    )


def allowed_actions(settings: Agent, last: bool) -> Actions:
    """What the model may do in a turn; `last` where it must answer."""
    if last:
        return ("answer",)
    return ("search", "answer") if settings.answer else ("search",)


def outcome_of(step: Step, last: bool) -> tuple[Action, TurnFailure | None, str | None]:
    """(action, why it was none, and more words on that) of a turn; `last` where it must answer."""
    if step.action == "search" and last:
        return "none", "not_an_answer", "a search in the turn that must answer"
    if step.action == "none":
        return "none", step.asks[0].failure, step.asks[0].detail
    return step.action, None, None


def _turn(number: int, completion: Completion, step: Step, searches: Sequence[SearchRecord], last: bool) -> Turn:
    action, failure, detail = outcome_of(step, last)
    return Turn(
        turn=number,
        raw_text=step.raw_text,
        reasoning=step.reasoning,
        action=action,
        searches=searches,
        failure=failure,
        failure_detail=detail,
        read_by=step.read_by,
        repaired=step.repaired,
        finish_reason=completion.finish_reason,
        prompt_tokens=completion.prompt_tokens,
        completion_tokens=completion.completion_tokens,
        latency_s=completion.latency_s,
    )
