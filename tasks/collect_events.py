"""The events of a simulated collection: what tasks/collect.py does, with a clock that is only counted. See tasks/simulate.py."""

import heapq
import itertools
import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
from pydantic import Field

from tasks import config
from tasks.collect import shards_at_once
from tasks.errors import ConfigError

Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]

STARTED, ENDED = 2, 1  # messages of a task run to the orchestrator: pending and running; completed
_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.5, 30.0  # of tasks/agent/client.py
_MOST_KILLS = 10_000
_TODO, _FINISHED, _FAILED = range(3)  # what stored parts say of a rollout
_ISSUED, _ARRIVED, _ENDED, _WRITTEN, _KILLED = range(5)  # kinds of events


class Flow(config.Settings):
    """A collection and what it runs on."""

    rollouts: int = Field(ge=1, le=10_000_000, description="Rollouts in all: questions × configurations × samples.")
    turns: int = Field(ge=1, le=1000, description="Model calls that a rollout makes.")
    service_s: Positive = Field(description="Seconds that the model server takes for a call at its full load.")
    servers: int = Field(ge=1, le=10_000, description="Model servers.")
    sequences: int = Field(ge=1, le=10_000, description="Sequences that a server generates at once (max_num_seqs).")
    concurrency: int = Field(ge=1, description="Rollouts in flight at once in one worker: its gate.")
    workers: int = Field(
        default=1, ge=1, le=10_000, description="Processes that shards are spread over; each has a gate."
    )
    samples: int = Field(default=4, ge=1, description="Rollouts of a question: configurations × samples.")
    shard_size: int = Field(default=config.Collect().shard_size, ge=1, description="Questions in a shard.")
    flush_every: int | None = Field(
        default=None, ge=1, description="Ended rollouts that wait when a part is written; None: as many as concurrency."
    )
    client_s: Amount = Field(default=0.0019, description="Seconds of a worker's one core that a call takes.")
    failure_share: config.Share = Field(
        default=0.0, description="Share of calls that fail in a way that can pass (HTTP 503)."
    )
    max_retries: int = Field(
        default=config.Server().max_retries, ge=0, le=100, description="Further tries of a failed call."
    )
    passes: int = Field(default=1, ge=1, description="Times that the run is made, as long as some rollouts are failed.")
    kills_per_hour: Amount = Field(default=0.0, description="Kills or preemptions of each worker in an hour.")
    restart_s: Amount = Field(default=120.0, description="Seconds from a kill until the worker runs again.")
    put_s: Amount = Field(default=0.15, description="Seconds that writing a part takes. S3: 0.1 to 0.2.")
    writers: int = Field(
        default=12, ge=1, le=32, description="Threads of a worker that write: its cores + 4, at most 32."
    )
    task_s: Amount = Field(default=0.005, description="Seconds that Prefect's engine takes for a task run.")
    broker_messages: int = Field(default=10_000, ge=1, description="Messages that the orchestrator's broker holds.")
    recorded_per_s: Positive = Field(default=170.0, description="Messages a second that the orchestrator records.")
    part_bytes: Amount = Field(default=48_000.0, description="Bytes of a Parquet part, or row group, beside its rows.")
    row_bytes: Amount = Field(default=1_500.0, description="Bytes that each row adds to it.")
    fold_rollout_s: Amount = Field(default=0.00035, description="Seconds that the fold takes for a rollout.")
    seed: int = Field(default=0, ge=0, description="Of failures, backoffs and kills.")

    @property
    def shard_rollouts(self) -> int:
        """Rollouts in a full shard."""
        return self.shard_size * self.samples

    @property
    def shards(self) -> int:
        """Shards of a run; the last one may not be full."""
        return -(-self.rollouts // self.shard_rollouts)


@dataclass
class Counts:
    """What happened. Rollouts = `finished` + `failed`; `rows` = these + `tried_again`, unless kills cost some of the rows."""

    seconds: float = 0.0  # until the last part is written
    calls: int = 0  # that reached a server; tries that failed are among them
    parts: int = 0  # written whole
    rows: int = 0  # in these parts
    finished: int = 0
    failed: int = 0
    tried_again: int = 0  # failed rollouts that a later start of their worker ran again
    redone: int = 0  # rollouts that kills cost: under way, or ended and in no part yet
    kills: int = 0
    starts: list[float] = field(default_factory=list)  # times at which task runs started
    ends: list[float] = field(default_factory=list)  # times at which they ended


def failing_calls(share: float, seed: int) -> Iterator[int]:
    """Ascending numbers, from 1, of the calls that fail, each with probability `share`."""
    draw, at = np.random.default_rng(seed), 0
    while share:
        at += int(draw.geometric(share))
        yield at


def run(flow: Flow, fails: Iterator[int]) -> Counts:
    """Run a collection from its start to its last part.

    Args:
        fails: ascending numbers, from 1, of the calls that fail.

    Raises:
        ConfigError: workers are killed so often that the run does not end.
    """
    running = _Run(flow, fails)
    for _ in range(flow.passes):
        ended = running.counts.seconds
        for worker in range(flow.workers):
            running.start(worker, ended)
        running.to_the_end()
        if not (running.state == _FAILED).any():
            break
    running.counts.finished = int((running.state == _FINISHED).sum())
    running.counts.failed = int((running.state == _FAILED).sum())
    return running.counts


class _Run:
    """The state of a run. An event is (time, number, kind, subject, epoch): the number keeps ties in their order, and what a
    worker had under way when it was killed has an older epoch than the worker."""

    def __init__(self, flow: Flow, fails: Iterator[int]) -> None:
        self.flow, self.fails, self.counts = flow, fails, Counts()
        self.next_failing = next(fails, 0)
        self.random = random.Random(flow.seed)
        self.state = np.full(flow.rollouts, _TODO, np.uint8)
        self.shard_of = np.arange(flow.rollouts) // flow.shard_rollouts
        self.events: list[tuple[float, int, int, int, int]] = []
        self.numbers = itertools.count()
        self.slots, self.next_slot = [0.0] * (flow.servers * flow.sequences), 0  # when each sequence is free again
        # of rollouts
        self.turns_left = [0] * flow.rollouts
        self.bad: set[int] = set()  # whose call under way fails
        self.tries: dict[int, int] = {}  # failed tries of the present call
        # of shards
        self.ready = [0.0] * flow.shards  # when its task run has started
        self.left = [0] * flow.shards  # rollouts that have not ended
        self.waiting: list[list[int]] = [[] for _ in range(flow.shards)]  # ended, in no part; ~rollout where it failed
        self.writing: list[list[int]] = [[] for _ in range(flow.shards)]
        # of workers
        self.epoch = [0] * flow.workers
        self.shards_left: list[Iterator[int]] = [iter(())] * flow.workers  # that have no task run yet
        self.start_free = [0.0] * flow.workers  # when its next task run can start
        self.loop_free = [0.0] * flow.workers  # when the one core is free again
        self.write_free = [[0.0]] * flow.workers  # when each writing thread is
        self.queue: list[deque[int]] = [deque() for _ in range(flow.workers)]  # rollouts before the gate
        self.under_way = [0] * flow.workers  # rollouts that hold the gate
        self.open_shards = [0] * flow.workers
        self.ended = [0] * flow.workers  # rollouts that ended, and whose part nobody has begun to write
        self.holding: list[set[int]] = [set() for _ in range(flow.workers)]  # shards that such rollouts are of

    def push(self, time: float, kind: int, subject: int, epoch: int) -> None:
        heapq.heappush(self.events, (time, next(self.numbers), kind, subject, epoch))

    def worker_of(self, rollout: int) -> int:
        return rollout // self.flow.shard_rollouts % self.flow.workers

    def start(self, worker: int, time: float) -> None:
        """Run what no part holds as finished; from the first shard on where that is so, each is a task run again."""
        flow = self.flow
        own = self.state[self.shard_of % flow.workers == worker]
        self.counts.tried_again += int((own == _FAILED).sum())
        self.loop_free[worker] = self.start_free[worker] = time
        self.write_free[worker] = [time] * flow.writers
        self.shards_left[worker] = itertools.dropwhile(self.finished, range(worker, flow.shards, flow.workers))
        self.queue[worker].clear()
        self.open_shards[worker] = 0
        self.open(worker, time)
        if self.open_shards[worker] and (per_s := flow.kills_per_hour / 3600):
            after = self.random.expovariate(per_s)
            self.push(time + after, _KILLED, worker, self.epoch[worker])

    def finished(self, shard: int) -> bool:
        """Whether parts hold every rollout of a shard as finished."""
        per = self.flow.shard_rollouts
        return bool((self.state[shard * per : (shard + 1) * per] == _FINISHED).all())

    def open(self, worker: int, time: float) -> None:
        """Start task runs of further shards, as many as may be under way, and let their rollouts through the gate."""
        flow, per = self.flow, self.flow.shard_rollouts
        while self.open_shards[worker] < shards_at_once(flow.concurrency):
            shard = next(self.shards_left[worker], None)
            if shard is None:
                break
            begin = self.start_free[worker] = max(time, self.start_free[worker]) + flow.task_s
            todo = np.flatnonzero(self.state[shard * per : (shard + 1) * per] != _FINISHED) + shard * per
            self.counts.starts.append(begin)
            self.ready[shard], self.left[shard] = begin, len(todo)
            self.queue[worker].extend(todo.tolist())
            if len(todo):
                self.open_shards[worker] += 1
            else:
                self.counts.ends.append(begin)
                self.counts.seconds = max(self.counts.seconds, begin)
        while self.queue[worker] and self.under_way[worker] < flow.concurrency:
            self.take(worker, time)

    def take(self, worker: int, time: float) -> None:
        """Let the next rollout through the gate, once its shard's task run has started."""
        if self.queue[worker]:
            rollout = self.queue[worker].popleft()
            self.under_way[worker] += 1
            self.turns_left[rollout] = self.flow.turns
            ready = self.ready[rollout // self.flow.shard_rollouts]
            self.push(max(time, ready), _ISSUED, rollout, self.epoch[worker])

    def to_the_end(self) -> None:
        """Work through all events."""
        flow, events, push_pop, numbers = self.flow, self.events, heapq.heapreplace, self.numbers
        per, workers, client_s, service_s = flow.shard_rollouts, flow.workers, flow.client_s, flow.service_s
        slots, loop_free, epochs, turns_left, bad = self.slots, self.loop_free, self.epoch, self.turns_left, self.bad
        calls, next_slot = self.counts.calls, self.next_slot
        while events:
            time, _, kind, subject, epoch = events[0]
            if kind >= _WRITTEN:
                heapq.heappop(events)
                (self.written if kind == _WRITTEN else self.killed)(subject, time, epoch)
                continue
            worker = subject // per % workers
            if epoch != epochs[worker]:  # it was under way when its worker was killed
                heapq.heappop(events)
                continue
            if kind == _ARRIVED:
                free = slots[next_slot]
                end = slots[next_slot] = (free if free > time else time) + service_s
                next_slot = next_slot + 1 if next_slot + 1 < len(slots) else 0
                calls += 1
                if calls == self.next_failing:
                    self.next_failing = next(self.fails, 0)
                    bad.add(subject)
                push_pop(events, (end, next(numbers), _ENDED, subject, epoch))
                continue
            if kind == _ENDED:
                if bad and subject in bad:
                    heapq.heappop(events)
                    self.try_again(subject, worker, time)
                    continue
                turns_left[subject] -= 1
                if self.tries:
                    self.tries.pop(subject, None)
                if not turns_left[subject]:
                    heapq.heappop(events)
                    self.over(subject, subject, worker, time)
                    continue
            free = loop_free[worker]
            loop_free[worker] = ready = (free if free > time else time) + client_s
            push_pop(events, (ready, next(numbers), _ARRIVED, subject, epoch))
        self.counts.calls, self.next_slot = calls, next_slot

    def try_again(self, rollout: int, worker: int, time: float) -> None:
        """A call failed: it is made again after the backoff of tasks/agent/client.py, or its rollout fails."""
        self.bad.discard(rollout)
        tries = self.tries[rollout] = self.tries.get(rollout, 0) + 1
        if tries > self.flow.max_retries:
            del self.tries[rollout]
            self.over(rollout, ~rollout, worker, time)
        else:
            wait = self.random.uniform(0, min(_LONGEST_DELAY_S, _FIRST_DELAY_S * 2 ** (tries - 1)))
            self.push(time + wait, _ISSUED, rollout, self.epoch[worker])

    def over(self, rollout: int, row: int, worker: int, time: float) -> None:
        """A rollout ended: the next goes through the gate, and its row waits for a part."""
        self.under_way[worker] -= 1
        self.take(worker, time)
        shard = rollout // self.flow.shard_rollouts
        self.left[shard] -= 1
        self.waiting[shard].append(row)
        self.ended[worker] += 1
        self.holding[worker].add(shard)
        if not self.left[shard]:
            self.write(shard, time)
        self.flush(worker, time)

    def flush(self, worker: int, time: float) -> None:
        """While too many wait, write those of the shard that has most: see tasks/unwritten.py."""
        while self.ended[worker] >= (self.flow.flush_every or self.flow.concurrency):
            idle = [shard for shard in self.holding[worker] if not self.writing[shard]]
            if not idle:
                return
            self.write(max(idle, key=lambda shard: (len(self.waiting[shard]), -shard)), time)

    def write(self, shard: int, time: float) -> None:
        """Write what waits of a shard, after the part that is being written."""
        rows, worker = self.waiting[shard], shard % self.flow.workers
        if rows and not self.writing[shard]:
            self.writing[shard], self.waiting[shard] = rows, []
            self.ended[worker] -= len(rows)
            self.holding[worker].discard(shard)
            free = self.write_free[worker]
            end = max(time, free[0]) + self.flow.put_s
            heapq.heapreplace(free, end)
            self.push(end, _WRITTEN, shard, self.epoch[worker])

    def written(self, shard: int, time: float, epoch: int) -> None:
        worker = shard % self.flow.workers
        if epoch != self.epoch[worker]:
            return
        rows, self.writing[shard] = self.writing[shard], []
        self.counts.parts += 1
        self.counts.rows += len(rows)
        for row in rows:
            self.state[row if row >= 0 else ~row] = _FINISHED if row >= 0 else _FAILED
        if not self.left[shard]:
            self.write(shard, time)
        self.flush(worker, time)
        if not self.left[shard] and not self.writing[shard]:
            self.counts.ends.append(time)
            self.open_shards[worker] -= 1
            self.open(worker, time)
            if not self.open_shards[worker]:
                self.epoch[worker] += 1  # no kill can hit it any more
                self.counts.seconds = max(self.counts.seconds, time)

    def killed(self, worker: int, time: float, epoch: int) -> None:
        """A worker is gone with all that no part holds, and starts again."""
        if epoch != self.epoch[worker]:
            return
        self.counts.kills += 1
        if self.counts.kills > _MOST_KILLS:
            raise ConfigError(
                f"{_MOST_KILLS:,} kills, and {int((self.state == _TODO).sum()):,} rollouts are still to do: with so many "
                "--kills-per-hour a run of this size does not end"
            )
        self.epoch[worker] += 1
        self.counts.redone += self.under_way[worker]
        self.under_way[worker] = self.ended[worker] = 0
        self.holding[worker].clear()
        for shard in range(worker, self.flow.shards, self.flow.workers):
            for rows in (self.waiting[shard], self.writing[shard]):
                self.counts.redone += len(rows)
                rows.clear()
        for rollout in [r for r in {*self.bad, *self.tries} if self.worker_of(r) == worker]:
            self.bad.discard(rollout)
            self.tries.pop(rollout, None)
        self.start(worker, time + self.flow.restart_s)
