"""Before a run: does this model, driven by this protocol, yield a search that can be read? If not, collecting is waste."""

import asyncio

from tasks.agent.completion import Complete, CompletionError
from tasks.agent.prompts import PROTOCOLS, wire_prompt
from tasks.agent.protocol import Step
from tasks.agent.rollout import allowed_actions
from tasks.agent.sampling import ResolvedSampling
from tasks.config import Agent
from tasks.errors import SelfTestError, ServerError

QUESTIONS = (
    "What was the company's total revenue in 2019?",
    "Which temperature may the pump not exceed?",
    "Who signed the lease on behalf of the tenant?",
    "How many members voted for the new by-law?",
)


async def self_test(settings: Agent, sampling: ResolvedSampling, complete: Complete) -> list[str]:
    """The queries of the first turns on a few questions; one that can be read is enough.

    Raises:
        SelfTestError: there is none; the message holds what the model wrote.
        ServerError: the server did not answer.
    """
    protocol = PROTOCOLS[settings.protocol]
    options = protocol.options(allowed_actions(settings, False), settings.guided)

    async def first_turn(question: str) -> Step:
        return protocol.parse(await complete(wire_prompt(question, settings), options, sampling, 0))

    try:
        steps = await asyncio.gather(*map(first_turn, QUESTIONS))
    except CompletionError as error:
        hint = (
            "; where it knows no fields but OpenAI's, set extensions to false (--no-extensions)"
            if error.refused
            else ""
        )
        raise ServerError(f"the model server did not answer a test question: {error}{hint}") from error
    if queries := [query for step in steps for query in step.queries]:
        return queries
    written = "\n".join(f"  {step.asks[0].detail if step.asks else 'it answered'}: {step.raw_text!r}" for step in steps)
    raise SelfTestError(
        f"with protocol {settings.protocol!r} the model wrote no search that can be read, for {len(steps)} test questions; "
        f"{_advice(settings)}. It wrote:\n{written}"
    )


def _advice(settings: Agent) -> str:
    if not settings.examples:
        return "put worked examples into the prompt (examples=true), or choose another protocol"
    if settings.protocol == "tools":
        return "serve it with its tool_call_parser, or choose protocol=tags, which any chat model can follow"
    return "choose another model, or allow more max_tokens"
