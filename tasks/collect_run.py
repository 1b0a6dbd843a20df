"""A collection from plan to fold, its shards as Prefect task runs side by side in one event loop."""

import asyncio
from collections import Counter
from collections.abc import Collection

from prefect import task
from prefect.context import AsyncClientContext
from prefect.transactions import CommitMode, transaction

from tasks import artifact, collect, config, failures, nights, server_api, states, storage
from tasks.agent.client import open_client
from tasks.agent.prompts import prompt_fingerprint
from tasks.agent.sampling import resolve
from tasks.agent.selftest import self_test
from tasks.agent.trajectory import Failure
from tasks.artifact import Artifact, provenance
from tasks.beside import run_beside
from tasks.cache import code_version
from tasks.chosen import select
from tasks.collect import ShardReport
from tasks.errors import CollectError, ServerError
from tasks.logs import run_logger
from tasks.progress import OnProgress, progress
from tasks.retries import may_pass
from tasks.supervise import Connect
from tasks.training.lineage import learned_about
from tasks.unwritten import Unwritten

OF_THE_SERVER: frozenset[Failure] = frozenset({"connection", "deadline", "server_error"})
"""Reasons for which a rollout fails when the server dies under it."""


def collect_all(
    settings: config.CollectRun,
    *,
    questions: Artifact,
    pages: Artifact,
    index: Artifact,
    connect: Connect,
    adapter: Artifact | None,
    model: str,
    run_key: str,
    run_uri: str,
    uri: str,
    check_first: bool,
    label: str,
    only: Collection[str] = (),
    began: Artifact | None = None,
    anew: str | None = None,
) -> Artifact:
    """Run what is not finished, fold, and return the trajectories. Where all is finished, no model is connected to.

    When our server died meanwhile, it is started again, and the rollouts that it failed are run again.

    Args:
        connect: says whom to ask: address and name.
        adapter: what is asked there, when it is not the base model.
        model: fingerprint of the model.
        run_uri: folder of the shards' parts.
        check_first: try a few questions before, and stop when none yields a search.
        label: what the progress bar says.
        only: ids of the questions to ask; all that the settings choose when empty.
        began: the states (tasks/states.py) that rollouts go on from; they begin with the question when None.
        anew: forget before what is stored of the chosen rollouts, once: this file says how far that has come, for a retry goes
            on from what its first time finished.

    Raises:
        CollectError: more rollouts failed than `allow_failed_share`; the others are kept.
        SelfTestError: the model yields no parsable search under these settings.
        ServerError: more failed than that, and our server died more often than `max_restarts`; the others are kept.
    """
    inputs = {"questions": questions, "pages": pages, "index": index} | ({"adapter": adapter} if adapter else {})
    inputs |= {"states": began} if began else {}
    order = None
    if settings.collect.order == "new-and-hardest":
        assert settings.collect.dt is not None
        alike = select(questions, settings.collect.split, None)
        inputs["order"] = nights.order(alike, storage.resolve(settings.storage), settings.collect.dt, run_uri)
        order = artifact.read_table(inputs["order"], ["question_id"])["question_id"].to_pylist()
    states_of = states.of_questions(began) if began is not None else None
    shards = collect.plan(questions, settings.collect, run_key, order, only, states_of)
    if anew:
        collect.forget_once(shards, run_uri, anew)
    fingerprints = {
        "model_fingerprint": model,
        "index_fingerprint": index.sha256,
        "code_fingerprint": code_version("tasks.collect"),
    }
    planned = sum(len(shard.rollouts) for shard in shards)

    def run(
        chosen: list[collect.Shard], again: Collection[Failure] | None, check_first: bool
    ) -> dict[int, ShardReport]:
        server = connect(adapter)
        vllm = sorted({version for url in server.base_url if (version := server_api.engine_version(url))})
        with progress(label) as on_progress:  # after that of a server that starts
            running = _run_shards(
                chosen,
                settings,
                questions=questions,
                pages=pages,
                index=index,
                server=server,
                vllm=vllm,
                fingerprints=fingerprints,
                uri=run_uri,
                check_first=check_first,
                again=again,
                on_progress=on_progress,
                planned=planned,
                began=began,
            )
            # a transaction of their own: what shards have done is not shown as rolled back when the collection fails
            with transaction(commit_mode=CommitMode.EAGER):
                return {report.number: report for report in run_beside(running)}

    left = collect.unfinished(shards, run_uri)
    reports = run(left, None, check_first) if left else {}
    dead: ServerError | None = None
    try:
        while (lost := [s for s in left if OF_THE_SERVER & reports[s.number].failed.keys()]) and connect.revive():
            reports |= run(lost, OF_THE_SERVER, False)
    except ServerError as error:
        dead = error  # which rollouts that cost is told all the same, and they may be few enough
    try:
        failures.judge(list(reports.values()), shards, run_uri, settings.collect)
    except CollectError as error:
        raise dead or error from None
    if dead:
        run_logger().warning("%s", dead)
    facts = provenance(
        inputs,
        settings=settings.model_dump(mode="json", exclude={"storage": True, "server": {"base_url"}}),
        model=settings.server.model,
        learned=learned_about(adapter, questions) if adapter else None,
        prompt_fingerprint=prompt_fingerprint(settings.agent),
        **fingerprints,
    )
    folded = collect.fold(shards, run_uri, storage.join(uri, "trajectories.parquet"), facts)
    if anew:
        collect.mark_done(anew)
    return folded


async def _run_shards(
    shards: list[collect.Shard],
    settings: config.CollectRun,
    *,
    questions: Artifact,
    pages: Artifact,
    index: Artifact,
    server: config.Server,
    vllm: list[str],
    fingerprints: dict[str, str],
    uri: str,
    check_first: bool,
    again: Collection[Failure] | None,
    on_progress: OnProgress,
    planned: int,
    began: Artifact | None,
) -> list[ShardReport]:
    """Shards side by side under one gate: which of them a rollout belongs to does not matter to the server.

    No more are under way than it takes to keep the gate full, so that the orchestrator hears of them one by one.

    Args:
        vllm: the versions of vLLM that are asked.
        planned: how many rollouts the whole collection has. Those of other shards have ended.
    """
    done: Counter[int] = Counter()
    elsewhere = planned - sum(len(shard.rollouts) for shard in shards)
    numbered = {shard.number: shard for shard in shards}

    if check_first:
        async with open_client(server) as conversation:
            sampling = resolve(settings.collect.sampling_config[0], settings.sampling)
            await self_test(settings.agent, sampling, conversation())
    async with collect.open_attempts(
        questions,
        pages,
        index,
        agent=settings.agent,
        search=settings.search,
        sampling=settings.sampling,
        server=server,
        root=storage.resolve(settings.storage),
        fingerprints=fingerprints,
        began=began,
    ) as attempt:

        @task(
            name="shard",
            task_run_name="shard {number}",
            retries=2,
            retry_delay_seconds=5,
            retry_condition_fn=may_pass,
            persist_result=False,
        )
        async def run_shard(number: int) -> ShardReport:
            done[number] = 0  # a shard that is tried again counts anew

            def on_done(rollouts: int) -> None:
                done[number] += rollouts
                on_progress(elsewhere + done.total(), planned)

            return await collect.run_shard(
                numbered[number],
                uri=uri,
                unwritten=unwritten,
                attempt=attempt,
                on_done=on_done,
                again=again,
                vllm=vllm,
            )

        unwritten = Unwritten(settings.collect.flush_every or server.concurrency)
        under_way = asyncio.Semaphore(collect.shards_at_once(server.concurrency))

        async def in_turn(number: int) -> ShardReport:
            async with under_way:
                return await run_shard(number)

        # one client of Prefect's API for all of them: each would make one of its own, which holds up the loop by 17 ms
        async with AsyncClientContext.get_or_create():
            return list(await asyncio.gather(*map(in_turn, numbered)))
