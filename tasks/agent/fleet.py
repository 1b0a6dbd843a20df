"""The servers behind one run: which of them a call goes to, and which are left out until they answer again."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass

import openai

from tasks.errors import ServerError
from tasks.logs import run_logger
from tasks.server_api import check_health, served_models

_ASK_EVERY_S = 5.0


@dataclass(eq=False)
class Member:
    """One server. `out` is set from a failed call on, until the server says that it is well."""

    base_url: str
    client: openai.AsyncOpenAI
    in_flight: int = 0
    out: bool = False


class Fleet:
    """Chooses among servers. Of a single one there is nothing to choose, and it is never left out."""

    def __init__(self, members: Sequence[Member], model: str) -> None:
        self._members, self._model = members, model
        self.asking: set[asyncio.Task[None]] = set()  # one for each server that is left out

    def choose(self, at: Member | None, asked: Sequence[Member]) -> Member:
        """The server for a call: `at`, where the conversation is, if it is well; else the one with the fewest calls in flight.

        Args:
            asked: servers that failed the call in this try. While none of the others is well, one that is not is asked.
        """
        if at is not None and not at.out and at not in asked:
            return at
        left = [member for member in self._members if member not in asked]
        return min([member for member in left if not member.out] or left, key=lambda member: member.in_flight)

    def has_other(self, asked: Sequence[Member]) -> bool:
        """Whether a server is well that did not fail the call in this try."""
        return any(not member.out and member not in asked for member in self._members)

    def leave_out(self, failed: Member) -> None:
        """Ask no more of a server that failed a call, until it says that it is well: at once, or when it is back."""
        if len(self._members) > 1 and not failed.out:
            failed.out = True
            task = asyncio.create_task(self._until_well(failed))
            self.asking.add(task)
            task.add_done_callback(self.asking.discard)

    async def _until_well(self, member: Member) -> None:
        told = False
        while True:
            try:
                await asyncio.to_thread(_check, member.base_url, self._model)
            except ServerError as error:
                if not told:
                    run_logger().warning("%s is left out until it answers again: %s", member.base_url, error)
                told = True
                await asyncio.sleep(_ASK_EVERY_S)
            else:
                break
        member.out = False
        if told:
            run_logger().info("%s answers again", member.base_url)


def _check(base_url: str, model: str) -> None:
    check_health(base_url)
    if model not in served_models(base_url):
        raise ServerError(f"{base_url} no longer serves {model}")


@contextlib.asynccontextmanager
async def open_fleet(clients: Mapping[str, openai.AsyncOpenAI], model: str) -> AsyncIterator[Fleet]:
    """The servers at these addresses, for as long as the block runs.

    Args:
        model: what a server must serve, to be asked again after it was gone.
    """
    fleet = Fleet([Member(url, client) for url, client in clients.items()], model)
    try:
        yield fleet
    finally:
        for task in fleet.asking:
            task.cancel()
