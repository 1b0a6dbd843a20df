"""What a collection of any size would do, by simulation: how long, what limits it, what breaks, what it leaves in storage.

    python -m tasks.simulate --rollouts 1000000 --turns 4 --service-s 6 --servers 8 --sequences 128 --concurrency 1024

--help lists every setting with its unit. A million rollouts of four turns take about ten seconds on one core.

What is simulated (tasks/collect_events.py) is this project's own shape: questions in shards, a shard a task run, as many
shards of a worker at once as keep its one gate of `concurrency` rollouts full, a part written when `flush_every` rollouts wait
for one (tasks/unwritten.py), calls tried again after a backoff, workers that are killed and start again with whatever no
stored part holds, and one fold at the end.

The model server takes `service_s` for every call, `servers` × `sequences` of them at once; others queue in order of arrival.
So does vLLM behind a least-loaded choice, if `service_s` is measured at that load. What limits is told by the seconds that the
work would take if only one resource were scarce: no run is faster than the slowest of these (Denning & Buzen, The Operational
Analysis of Queueing Network Models, 1978).
"""

import argparse
import math
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tasks import collect_events, config
from tasks.collect import shards_at_once
from tasks.collect_events import ENDED, STARTED, Counts, Flow
from tasks.config.base import checked, dotted
from tasks.errors import DragError

# Measured for this code on two cores; infra/SCALE.md says how.
PLANNED_BYTES = 230  # memory of a rollout that is planned
TURN_BYTES = 1_400  # memory of a shard that waits for its turn
WAITING_BYTES = 2_500  # further memory of a rollout whose shard is under way, and which waits at the gate
TASK_RUN_BYTES = 14_000  # memory of a Prefect task run under way
FOLD_FACTOR = 2.2  # memory of the fold over the bytes of the file that it writes
ROW_GROUP_BYTES = 63_000  # memory to open a trajectories file, for each row group; a shard is one
LARGEST_PUT = 5 * 2**30  # bytes of one PUT at most (Amazon S3 User Guide, "Uploading objects")

S = TypeVar("S", bound=config.Settings)


@dataclass(frozen=True)
class Outcome:
    """What a simulated run did, and what follows from it. Times in seconds, sizes in bytes."""

    flow: Flow
    counts: Counts
    messages: int  # of task runs to the orchestrator
    messages_per_s: int  # in the busiest second
    waiting_messages: int  # in the orchestrator's broker, at most
    lost_messages: int  # that it dropped

    @property
    def fold_s(self) -> float:
        """What the fold takes, after the last part."""
        return self.flow.rollouts * self.flow.fold_rollout_s

    @property
    def puts(self) -> int:
        """Objects written: parts, and the folded file."""
        return self.counts.parts + 1

    @property
    def part_bytes(self) -> float:
        """All parts."""
        return self.counts.parts * self.flow.part_bytes + self.counts.rows * self.flow.row_bytes

    @property
    def folded_bytes(self) -> float:
        """The trajectories file, which has a row group for each shard."""
        return self.flow.shards * self.flow.part_bytes + self.flow.rollouts * self.flow.row_bytes

    @property
    def collect_memory(self) -> float:
        """What the plan, the waiting rollouts and the task runs of one worker take at its start."""
        flow = self.flow
        under_way = min(flow.shards, flow.workers * shards_at_once(flow.concurrency))
        waiting = min(flow.rollouts, under_way * flow.shard_rollouts) * WAITING_BYTES + under_way * TASK_RUN_BYTES
        return (flow.rollouts * PLANNED_BYTES + flow.shards * TURN_BYTES + waiting) / flow.workers

    @property
    def fold_memory(self) -> float:
        """What the fold takes at its end, when it holds the whole compressed file."""
        return FOLD_FACTOR * self.folded_bytes

    @property
    def open_memory(self) -> float:
        """What a reader takes to open the trajectories file: its content, and what it knows of each row group."""
        return self.folded_bytes + self.flow.shards * ROW_GROUP_BYTES

    @property
    def alone_s(self) -> dict[str, float]:
        """Resource → seconds that the run would take if only that one were scarce. None of them is above `counts.seconds`."""
        flow, counts = self.flow, self.counts
        return {
            "server": counts.calls * flow.service_s / (flow.servers * flow.sequences),
            "gate": counts.calls * (flow.service_s + flow.client_s) / (flow.concurrency * flow.workers),
            "client core": counts.calls * flow.client_s / flow.workers,
            "orchestrator": len(counts.starts) * flow.task_s / flow.workers,
            "storage": counts.parts * flow.put_s / (flow.writers * flow.workers),
            "one rollout's turns": flow.turns * (flow.service_s + flow.client_s) if counts.finished else 0.0,
        }

    @property
    def limits(self) -> list[str]:
        """The resources that take longest alone, to one in a hundred: what to have more of, all of them at once."""
        longest = max(self.alone_s.values())
        return [name for name, seconds in self.alone_s.items() if seconds >= 0.99 * longest]

    @property
    def breaks(self) -> list[str]:
        """What does not work at this size, however long it may take."""
        found = []
        if self.lost_messages:
            found.append(
                f"the orchestrator's broker holds {self.flow.broker_messages:,} messages and drops {self.lost_messages:,} of "
                f"{self.messages:,}: its record lacks task runs, though no result is lost. Larger shards, or Redis"
            )
        if self.folded_bytes > LARGEST_PUT:
            found.append(
                f"the trajectories file has {_size(self.folded_bytes)}, and one PUT to S3 takes 5.0 GiB. Several smaller runs"
            )
        return found


def broker(times: Iterable[float], capacity: int, per_s: float) -> tuple[int, int]:
    """A queue of `capacity` messages from which `per_s` a second are taken, fed one at each of `times` (s, ascending).

    Returns:
        How many waited at most, and how many found the queue full and were dropped.
    """
    waiting = last = peak = 0.0
    dropped = 0
    for time in times:
        waiting, last = max(0.0, waiting - (time - last) * per_s), time
        if waiting + 1 > capacity:
            dropped += 1
        else:
            waiting += 1
            peak = max(peak, waiting)
    return math.ceil(peak), dropped


def simulate(flow: Flow, fails: Iterator[int] | None = None) -> Outcome:
    """Run a collection.

    Args:
        fails: ascending numbers, from 1, of the calls that fail; when None, drawn with the flow's `failure_share`.

    Raises:
        ConfigError: workers are killed so often that the run does not end.
    """
    if fails is None:
        fails = collect_events.failing_calls(flow.failure_share, flow.seed)
    counts = collect_events.run(flow, fails)
    times = np.sort(np.array(counts.starts * STARTED + counts.ends * ENDED))
    waiting, lost = broker(times.tolist(), flow.broker_messages, flow.recorded_per_s)
    return Outcome(
        flow=flow,
        counts=counts,
        messages=len(times),
        messages_per_s=int(np.unique(np.floor(times), return_counts=True)[1].max()),
        waiting_messages=waiting,
        lost_messages=lost,
    )


def _size(number: float) -> str:
    unit = min(3, int(math.log(max(1.0, number), 1024)))
    return f"{number / 1024**unit:.1f} {('bytes', 'KiB', 'MiB', 'GiB')[unit]}"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.2f} h"


def table(outcome: Outcome) -> Table:
    """What came out, as people read it."""
    flow, counts = outcome.flow, outcome.counts
    shown = Table(title=f"{flow.rollouts:,} rollouts, simulated", title_justify="left", show_header=False)
    shown.add_column()
    shown.add_column(justify="right")
    shown.add_column()
    rate = flow.rollouts / counts.seconds
    shown.add_row("rollouts take", _time(counts.seconds), f"{rate:.1f} rollouts/s, {counts.calls:,} calls")
    shown.add_row("the fold takes", _time(outcome.fold_s), "one core, after the last part")
    shown.add_row("finished, failed", f"{counts.finished:,}, {counts.failed:,}", f"{counts.tried_again:,} tried again")
    shown.add_row("kills", f"{counts.kills:,}", f"{counts.redone:,} rollouts done again")
    shown.add_section()
    for name, seconds in outcome.alone_s.items():
        note = "limits: have more of it" if name in outcome.limits else ""
        shown.add_row(f"{name}, busy", f"{seconds / counts.seconds:.1%}", note)
    shown.add_section()
    task_runs = len(counts.starts)
    shown.add_row(
        "task runs", f"{task_runs:,}", f"{outcome.messages:,} messages, {outcome.messages_per_s:,} in a second"
    )
    shown.add_row("broker, at most", f"{outcome.waiting_messages:,}", f"{outcome.lost_messages:,} dropped")
    shown.add_row("objects written", f"{outcome.puts:,}", f"{counts.rows:,} rows, {_size(outcome.part_bytes)}")
    shown.add_row("trajectories file", _size(outcome.folded_bytes), f"{flow.shards:,} row groups")
    shown.add_section()
    shown.add_row("memory, a worker", _size(outcome.collect_memory), "plan, waiting rollouts, task runs")
    shown.add_row("memory, fold", _size(outcome.fold_memory), "at its end")
    shown.add_row("memory, each reader", _size(outcome.open_memory), "to open the trajectories file")
    return shown


def flags(model: type[config.Settings], doc: str, given: Iterable[str] = ()) -> argparse.ArgumentParser:
    """A parser whose flags are a model's fields. A field named in `given` is not demanded, as its value comes otherwise."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS
    )
    for name, info in model.model_fields.items():
        needed = " Required." if info.is_required() and name not in given else ""
        default = "" if info.is_required() or info.default is None else f" Default: {info.default}."
        text = f"{info.description}{needed}{default}".replace("%", "%%")
        parser.add_argument(f"--{name.replace('_', '-')}", metavar=_kind(info.annotation), help=text)
    return parser


def _kind(annotation: object) -> str:
    kinds = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return "N" if int in kinds else "X" if float in kinds or any(map(typing.get_args, kinds)) else "TEXT"


def validated(model: type[S], values: typing.Mapping[str, object]) -> S:
    """Values as settings.

    Raises:
        ConfigError: one is missing or out of range; the message names flag and reason.
    """
    return checked(
        model, values, lambda at: "--" + dotted(at).replace("_", "-").replace(".", "-") if at else "settings"
    )


def exit_code(work: Callable[[], None]) -> int:
    """Do the work of a command; what a user can mend is said without a traceback, and its exit code returned."""
    try:
        work()
    except DragError as error:
        Console(stderr=True).print(f"[bold red]{type(error).__name__}[/]: {escape(str(error))}", soft_wrap=True)
        return error.exit_code
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Simulate what the flags describe; returns the exit code."""
    values = vars(flags(Flow, __doc__ or "").parse_args(argv))

    def work() -> None:
        outcome = simulate(validated(Flow, values))
        Console().print(table(outcome))
        for sentence in outcome.breaks:
            Console().print(f"[bold red]breaks[/]: {escape(sentence)}", soft_wrap=True)

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
