"""Collection: questions × sampling configurations × samples → trajectories. No rollout is lost, none is done twice.

`plan` lists the rollouts and groups them in shards. `unfinished` tells where there is anything left to do. `run_shard` runs what
a shard has not finished yet and stores every attempt in Parquet parts as rollouts finish. `fold` makes one trajectories artifact
of the parts. All shards of a process share what `open_attempts` opens: one connection pool, one index, one gate.

    <uri>/shard-00003/part-001-0002-9f3c1a7e.parquet    the shard's first run, its third part, a random name
"""

import asyncio
import contextlib
import itertools
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from tasks import artifact, config, states, storage
from tasks.agent.rollout import rollout, search_with
from tasks.agent.sampling import resolve
from tasks.agent.trajectory import Failure, Question, to_row
from tasks.artifact import Artifact
from tasks.breaker import Breaker
from tasks.chosen import digest, select
from tasks.errors import ArtifactError, StorageError
from tasks.images import PageImages
from tasks.pages import PageStore
from tasks.search.index import open_index
from tasks.unwritten import Unwritten

SCHEMA = "trajectories/2"
_READ_AT_ONCE = 16  # shards


@dataclass(frozen=True)
class RolloutSpec:
    """One planned run of the agent. The id says which; whoever plans the same again gets the same id and seed."""

    rollout_id: str
    question_id: str
    sampling: config.SamplingName
    sample: int
    seed: int
    state: str | None = None  # the conversation that it goes on from; None when it begins with the question


@dataclass(frozen=True)
class Shard:
    """Rollouts that are run and stored together: one task run. JSON-able; holds names, no data."""

    number: int
    rollouts: tuple[RolloutSpec, ...]


@dataclass(frozen=True)
class ShardReport:
    """What came of a shard's rollouts that somebody is to be told."""

    number: int
    failed: dict[str, int]  # rollouts without a finished attempt, by reason
    tried_again: int  # failed in an earlier run, and run again


Attempt = Callable[[RolloutSpec, int], Awaitable[dict[str, Any]]]
"""Runs a rollout, given the attempt's number from 1; returns a trajectories row, its status "finished" or "failed"."""


def plan(
    questions: Artifact,
    settings: config.Collect,
    run_key: str,
    order: Sequence[str] | None = None,
    only: Collection[str] = (),
    began: Mapping[str, Sequence[str | None]] | None = None,
) -> list[Shard]:
    """The rollouts of a run, in shards. Those of a state come together, so that the server need read its messages but once.

    Args:
        only: ids of questions; their rollouts alone, in the shards that they have among all, so that the run that asks all
            questions finds them. All within the limit when empty.
        order: ids of the split's questions in the order to take them; that of `select` when None.
        began: states that the rollouts of each question go on from (`states.of_questions`); the question alone when None.
        run_key: names the run: a hash of everything that a rollout depends on. It goes into the rollout ids, so another
            model or prompt never passes for this one. Under the same key a larger `limit` only adds shards at the end, and
            more samples or sampling configurations only add rollouts to the shards of the same questions.
    """

    def rollouts(question_ids: Sequence[str]) -> Iterator[RolloutSpec]:
        alike = list(itertools.product(dict.fromkeys(settings.sampling_config), range(settings.samples)))
        for question_id in question_ids:
            for state in (None,) if began is None else began.get(question_id, ()):
                for sampling, sample in alike:
                    rollout_id = digest(run_key, question_id, *([state] if state else []), sampling, sample)[:24]
                    seed = int(digest(settings.seed, rollout_id)[:8], 16) & 0x7FFFFFFF
                    yield RolloutSpec(rollout_id, question_id, sampling, sample, seed, state)

    if order is None:
        order = select(questions, settings.split, None)
    chosen, size = order if only else order[: settings.limit], settings.shard_size
    parts = [chosen[at : at + size] for at in range(0, len(chosen), size)]
    if only:
        parts = [[id_ for id_ in part if id_ in only] for part in parts]
    return [Shard(number, tuple(rollouts(part))) for number, part in enumerate(parts) if part]


def shards_at_once(concurrency: int) -> int:
    """How many shards of a process need be under way so that `concurrency` rollouts always are, with some shards at their end.

    As many shards as rollouts would do, as each has one to run; half of these may be writing their last part.
    """
    return 2 * concurrency


def _folder(uri: str, shard: Shard) -> str:
    return storage.join(uri, f"shard-{shard.number:05d}")


def _best_attempts(table: pa.Table) -> dict[str, int]:
    """Row of each rollout's attempt that counts: the earliest finished, else the latest failed."""
    best: dict[str, tuple[tuple[int, int], int]] = {}
    columns = (table[name].to_pylist() for name in ("rollout_id", "status", "attempt"))
    for row, (rollout_id, status, attempt) in enumerate(zip(*columns, strict=True)):
        # Two processes that ran the shard at once have left equal attempt numbers; then the first part name decides.
        merit = (1, -attempt) if status == "finished" else (0, attempt)
        if rollout_id not in best or merit > best[rollout_id][0]:
            best[rollout_id] = merit, row
    return {rollout_id: row for rollout_id, (_, row) in best.items()}


def attempts_that_count(shard: Shard, uri: str, columns: Sequence[str] | None = None) -> pa.Table:
    """The attempt that counts of each rollout of a shard that has any, in the order of the plan: the earliest finished one,
    else the latest failed.

    Args:
        uri: folder of the run.
        columns: with rollout_id, status and attempt among them; all when None.
    """
    table = artifact.read_parts(_folder(uri, shard), SCHEMA, columns)
    return table.take(_rows_that_count(shard, table))


def _rows_that_count(shard: Shard, table: pa.Table) -> pa.Array:
    best = _best_attempts(table)
    return pa.array([best[s.rollout_id] for s in shard.rollouts if s.rollout_id in best], pa.int64())


@contextlib.asynccontextmanager
async def open_attempts(
    questions: Artifact,
    pages: Artifact,
    index: Artifact,
    *,
    agent: config.Agent,
    search: config.Search,
    sampling: config.Sampling,
    server: config.Server,
    root: str,
    fingerprints: Mapping[str, str],
    began: Artifact | None = None,
) -> AsyncIterator[Attempt]:
    """Open what rollouts need, once for all shards of a process: the server's client, the index, pages, the gate.

    At most `server.concurrency` rollouts run at once, whichever shards they belong to, so no shard's end leaves the server
    idle. Once all servers are seen to be gone, rollouts end at once with a typed failure, until one answers again.

    Args:
        server: its addresses are those of running servers.
        root: storage root, below which page images lie.
        fingerprints: model_fingerprint, index_fingerprint and code_fingerprint, as the rows shall carry them.
        began: the states (tasks/states.py) that rollouts go on from, where any does.

    Raises:
        ArtifactError: an artifact is missing or of another schema.
    """
    from tasks.agent.client import open_client  # the openai package takes half a second to import

    rows = await asyncio.to_thread(artifact.read_rows, questions)
    asked = {row["question_id"]: Question.from_row(row) for row in rows}
    find = search_with(await asyncio.to_thread(open_index, index, search), agent.top_k)
    page_store = await asyncio.to_thread(PageStore, pages)
    conversations = await asyncio.to_thread(states.conversations, began) if began else {}
    gate = asyncio.Semaphore(server.concurrency)

    async with (
        PageImages(root, page_store, agent, server.send_images) as images,
        open_client(server, images.url) as conversation,
    ):
        breaker = Breaker(server.base_url)

        async def attempt(spec: RolloutSpec, number: int) -> dict[str, Any]:
            async with gate:
                trajectory = await rollout(
                    asked[spec.question_id],
                    settings=agent,
                    sampling=resolve(spec.sampling, sampling),
                    seed=spec.seed,
                    complete=breaker.watch(conversation()),
                    search=find,
                    page_text=page_store.text,
                    page_image=images.image,
                    deadline_s=server.rollout_timeout,
                    earlier=conversations[spec.state] if spec.state else (),
                )
            if trajectory.status == "failed":
                breaker.lost += 1
            return to_row(
                trajectory,
                rollout_id=spec.rollout_id,
                attempt=number,
                sample=spec.sample,
                state=spec.state,
                model=server.model,
                **fingerprints,
            )

        yield attempt


def _earlier(folder: str) -> tuple[dict[str, dict[str, Any]], int]:
    """What a shard's stored parts say of each rollout, and the number of runs that wrote them."""
    table, parts = artifact.open_parts(folder, SCHEMA, ["rollout_id", "attempt", "status", "outcome"])
    rows = table.take(pa.array(_best_attempts(table).values(), pa.int64())).to_pylist()
    return {row["rollout_id"]: row for row in rows}, len({name.rsplit("-", 2)[0] for name, *_ in parts})


def unfinished(shards: Sequence[Shard], uri: str) -> list[Shard]:
    """The shards from the first on in which a rollout has no finished attempt; none when there is nothing left to do.

    The parts of those before it are read here and need not be read by `run_shard`, and few others are: a shard that may be left
    to do reads its own. What storage does not give just now may be left to do.

    Args:
        uri: folder of the run.

    Raises:
        ArtifactError: parts of an earlier run are damaged; `forget` them to start again.
    """

    def finished(shard: Shard) -> bool:
        try:
            known, _ = _earlier(_folder(uri, shard))
        except StorageError:
            return False
        return all(known.get(s.rollout_id, {}).get("status") == "finished" for s in shard.rollouts)

    at, size = 0, 1  # the first alone: of most runs it is left to do
    with ThreadPoolExecutor(_READ_AT_ONCE) as pool:
        while at < len(shards):
            done = list(pool.map(finished, shards[at : at + size]))
            if not all(done):
                return list(shards[at + done.index(False) :])
            at, size = at + size, _READ_AT_ONCE
    return []


async def run_shard(
    shard: Shard,
    *,
    uri: str,
    unwritten: Unwritten,
    attempt: Attempt,
    on_done: Callable[[int], None] = lambda rollouts: None,
    again: Collection[Failure] | None = None,
    vllm: Sequence[str] = (),
) -> ShardReport:
    """Run the rollouts of a shard that have no finished attempt yet; store every attempt in parts as rollouts finish.

    Parts are written as `unwritten` says, at the end, and when the run is cancelled or fails; what storage does not take, the
    next try in this process finds. So only a killed process loses anything: fewer than `flush_every` rollouts, and those
    that ended while a part was being written.
    A failed rollout is a row with its reason, and the shard goes on; the caller decides what share of failures it bears.
    Two processes may run the same shard at once: both are right, the work is done twice.

    Args:
        uri: folder of the run, which all its shards share.
        unwritten: what waits to be written, of all shards of the process.
        attempt: runs one rollout, see `open_attempts`; its gate decides how many run at once.
        on_done: told how many more rollouts have ended: at the start those of earlier runs, then each as it ends.
        again: reasons for which a rollout that failed in an earlier run is tried again; whatever the reason when None.
        vllm: the versions of vLLM that are asked, as the parts shall tell.

    Raises:
        ArtifactError: parts of an earlier run are damaged; `forget` them to start again.
    """
    folder = _folder(uri, shard)
    known, runs = await asyncio.to_thread(_earlier, folder)
    known |= {row["rollout_id"]: dict(row) for row in unwritten.left(folder)}
    todo, failed = [], Counter[str]()
    for spec in shard.rollouts:
        before = known.get(spec.rollout_id)
        if before is None or (before["status"] != "finished" and (again is None or before["outcome"] in again)):
            todo.append(spec)
        elif before["status"] != "finished":
            failed[before["outcome"]] += 1
    token, parts = uuid.uuid4().hex[:8], itertools.count()

    def write(rows: Sequence[Mapping[str, Any]]) -> None:
        name = f"part-{runs + 1:03d}-{next(parts):04d}-{token}.parquet"
        artifact.write_table(artifact.table_of(rows, SCHEMA), storage.join(folder, name), SCHEMA, {"vllm": vllm})

    async def run(spec: RolloutSpec) -> None:
        row = await attempt(spec, known.get(spec.rollout_id, {}).get("attempt", 0) + 1)
        if row["status"] != "finished":
            failed[row["outcome"]] += 1
        on_done(1)
        await unwritten.add(waiting, row)

    on_done(len(shard.rollouts) - len(todo))
    async with unwritten.shard(folder, write) as waiting:
        tasks = [asyncio.create_task(run(spec)) for spec in todo]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
    tried_again = sum(spec.rollout_id in known for spec in todo)
    return ShardReport(shard.number, dict(sorted(failed.items())), tried_again)


def fold(shards: Sequence[Shard], uri: str, out_uri: str, facts: Mapping[str, Any]) -> Artifact:
    """Make the trajectories artifact at `out_uri` (ends in .parquet) of a run's parts: one row a planned rollout.

    That row is the earliest finished attempt, else the latest failed one. Rows are in the order of the plan, so the same
    parts give the same bytes. One shard at a time is in memory, and the compressed file.

    Args:
        facts: provenance, with the fingerprints of model, prompt, index and code. To it comes which versions of vLLM made the
            rows, as far as their parts tell.

    Raises:
        ArtifactError: a planned rollout has no attempt at all: a shard has not run to its end.
    """
    engines: set[str] = set()
    told = dict(facts)

    def tables() -> Iterator[pa.Table]:
        for shard in shards:
            table, parts = artifact.open_parts(_folder(uri, shard), SCHEMA)
            rows = _rows_that_count(shard, table)
            if lost := len(shard.rollouts) - len(rows):
                raise ArtifactError(
                    f"shard {shard.number} under {uri} lacks {lost} of {len(shard.rollouts)} rollouts: collect again, "
                    "which does only what is missing"
                )
            made_by = [made.get("vllm", ()) for _, size, made in parts for _ in range(size)]
            engines.update(*(made_by[row] for row in rows.to_pylist()))
            yield table.take(rows)
        told["vllm"] = sorted(engines)

    return artifact.write_tables(tables(), out_uri, SCHEMA, told)


def forget(shards: Sequence[Shard], uri: str) -> None:
    """Delete what a run has stored of these rollouts, so that the next one runs them again. Others in their shards stay.

    Args:
        uri: folder of the run.
    """
    for shard in shards:
        chosen = pa.array([spec.rollout_id for spec in shard.rollouts], pa.string())
        for part in list(storage.iter_files(_folder(uri, shard))):
            try:
                stored, told = artifact.open_parts(part, SCHEMA)
            except ArtifactError:  # damaged: nobody can go on from it
                storage.delete(part)
                continue
            others = stored.filter(pc.invert(pc.is_in(stored["rollout_id"], chosen)))
            if not others.num_rows:
                storage.delete(part)
            elif others.num_rows < stored.num_rows:
                artifact.write_table(others, part, SCHEMA, told[0][2])


def forget_once(shards: Sequence[Shard], uri: str, marker: str) -> None:
    """`forget`, unless the file `marker` says that it was done; then it says so."""
    if not storage.exists(marker):
        forget(shards, uri)
        storage.write_bytes(marker, b"forgotten")


def mark_done(marker: str) -> None:
    """Note that all was run that was forgotten once."""
    storage.write_bytes(marker, b"done")


def is_done(marker: str) -> bool:
    """Whether that was noted."""
    return storage.exists(marker) and storage.read_bytes(marker) == b"done"
