"""Ask no model while all servers are gone, and go on when one is back."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tasks.agent.completion import Complete, Completion, CompletionError
from tasks.agent.sampling import ResolvedSampling
from tasks.errors import ServerError
from tasks.server_api import check_health

_LOST = 3
_ASK_EVERY_S = 5.0


class Breaker:
    """Lets model calls pass, but none while all servers are gone: each rollout would try again for long, for nothing.

    After `_LOST` failed rollouts without a completion between them, the servers are asked whether they are well. While none
    of them is, every call fails at once.
    """

    def __init__(self, base_urls: Sequence[str]) -> None:
        self.lost = 0  # rollouts that failed since the last completion
        self._base_urls = base_urls
        self._asking = asyncio.Lock()
        self._gone: tuple[float, str] | None = None  # when the servers were last found gone, and how

    def watch(self, complete: Complete) -> Complete:
        """`complete`, as long as a server is well."""

        async def watched(
            messages: Sequence[Mapping[str, Any]], request: Mapping[str, Any], sampling: ResolvedSampling, seed: int
        ) -> Completion:
            if self.lost >= _LOST:
                await self._ask()
            completion = await complete(messages, request, sampling, seed)
            self.lost = 0
            return completion

        return watched

    async def _ask(self) -> None:
        async with self._asking:
            if self.lost < _LOST:
                return
            if self._gone is None or time.monotonic() - self._gone[0] > _ASK_EVERY_S:
                try:
                    await asyncio.to_thread(_one_is_well, self._base_urls)
                except ServerError as error:
                    self._gone = time.monotonic(), str(error)
                else:
                    self._gone, self.lost = None, 0
                    return
            raise CompletionError("connection", f"not tried, as the server is gone: {self._gone[1]}")


def _one_is_well(base_urls: Sequence[str]) -> None:
    """Return if one of the servers is well; otherwise raise what the last one said."""
    for base_url in base_urls:
        try:
            return check_health(base_url)
        except ServerError as error:
            said = error
    raise said
