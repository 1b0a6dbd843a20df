"""What benches share: a model server in a process of its own, the bare openai client, a row of the table, a command line."""

import argparse
import asyncio
import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from typing import Any

import openai

Row = dict[str, Any]
Conversation = Sequence[Mapping[str, Any]]
_OF_VLLM = {"include_stop_str_in_output", "structured_outputs"}


def row(name: str, ours: float, peer: float, target: str, unit: str) -> Row:
    """A line of the table. `target` is said of ours / peer, such as "≥ 0.95"."""
    return {"name": name, "ours": ours, "peer": peer, "ratio": ours / peer, "target": target, "unit": unit}


def main(
    description: str, run: Callable[[bool], list[Row]], serve: Callable[[], Coroutine[Any, Any, str]] | None = None
) -> None:
    """A bench's command line: --quick measures less. What `served` starts comes here, too, and listens until it is killed."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and smaller ones: says less")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve and serve:
        asyncio.run(_forever(serve))
        return
    for made in run(args.quick):
        print("{name}: {ours:,.4g} {unit}, peer {peer:,.4g}, ratio {ratio:.3f} (target {target})".format(**made))


async def _forever(serve: Callable[[], Coroutine[Any, Any, str]]) -> None:
    print(await serve(), flush=True)
    await asyncio.Event().wait()


@contextlib.contextmanager
def served(module: str) -> Iterator[str]:
    """Address of the model server of a bench, in a process of its own."""
    with subprocess.Popen([sys.executable, "-m", module, "--serve"], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def conversations(requests: Iterable[Mapping[str, Any]], turns: int) -> list[list[Mapping[str, Any]]]:
    """What a server was sent, by rollout: each has a seed of its own, and `turns` requests."""
    found: dict[int, list[Mapping[str, Any]]] = {}
    for request in requests:
        found.setdefault(request["seed"], []).append(request)
    assert {len(sent) for sent in found.values()} == {turns}
    return list(found.values())


async def time_peer(url: str, sent: Sequence[Conversation], at_once: int) -> float:
    """Seconds that the openai client, as it comes, takes for the same requests, turn after turn."""
    gate = asyncio.Semaphore(at_once)
    async with openai.AsyncOpenAI(base_url=url, api_key="EMPTY") as client:

        async def converse(requests: Conversation) -> None:
            async with gate:
                for request in requests:
                    of_vllm = {name: value for name, value in request.items() if name in _OF_VLLM}
                    known = {name: value for name, value in request.items() if name not in _OF_VLLM}
                    await client.chat.completions.create(**known, extra_body=of_vllm)

        start = time.perf_counter()
        await asyncio.gather(*(converse(requests) for requests in sent))
        return time.perf_counter() - start
