"""A collection from plan to fold, its shards as Prefect task runs side by side in one event loop."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable

from prefect import task

from tasks import collect, config, storage
from tasks.agent.client import open_client
from tasks.agent.prompts import prompt_fingerprint
from tasks.agent.sampling import resolve
from tasks.agent.selftest import self_test
from tasks.artifact import Artifact, provenance
from tasks.cache import code_version
from tasks.errors import CollectError
from tasks.progress import OnProgress

RunShard = Callable[[collect.Shard], Awaitable[collect.ShardReport]]


def collect_all(
    settings: config.CollectRun,
    *,
    questions: Artifact,
    pages: Artifact,
    index: Artifact,
    server: config.Server,
    adapter: Artifact | None,
    model: str,
    run_key: str,
    run_uri: str,
    uri: str,
    check_first: bool,
    on_progress: OnProgress,
) -> Artifact:
    """Run what is not finished, fold, and return the trajectories.

    Args:
        server: whom to ask: address and name.
        adapter: what is asked there, when it is not the base model.
        model: fingerprint of the model.
        run_uri: folder of the shards' parts.
        check_first: try a few questions before, and stop when none yields a search.

    Raises:
        CollectError: more rollouts failed than `allow_failed_share`; the others are kept.
        SelfTestError: the model yields no parsable search under these settings.
    """
    shards = collect.plan(questions, settings.collect, run_key)
    fingerprints = {
        "model_fingerprint": model,
        "index_fingerprint": index.sha256,
        "code_fingerprint": code_version("tasks.collect"),
    }
    reports = asyncio.run(
        _run_shards(
            shards,
            settings,
            questions=questions,
            pages=pages,
            index=index,
            server=server,
            fingerprints=fingerprints,
            uri=run_uri,
            check_first=check_first,
            on_progress=on_progress,
        )
    )
    _judge(reports, settings.collect.allow_failed_share)
    facts = provenance(
        {"questions": questions, "pages": pages, "index": index} | ({"adapter": adapter} if adapter else {}),
        settings=settings.model_dump(mode="json", exclude={"storage": True, "server": {"base_url"}}),
        model=settings.server.model,
        prompt_fingerprint=prompt_fingerprint(settings.agent),
        **fingerprints,
    )
    return collect.fold(shards, run_uri, storage.join(uri, "trajectories.parquet"), facts)


async def _run_shards(
    shards: list[collect.Shard],
    settings: config.CollectRun,
    *,
    questions: Artifact,
    pages: Artifact,
    index: Artifact,
    server: config.Server,
    fingerprints: dict[str, str],
    uri: str,
    check_first: bool,
    on_progress: OnProgress,
) -> list[collect.ShardReport]:
    """All shards at once, under one gate: which of them a rollout belongs to does not matter to the server."""
    done: Counter[int] = Counter()
    total = sum(len(shard.rollouts) for shard in shards)

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
        fingerprints=fingerprints,
    ) as attempt:

        @task(name="shard", retries=2, retry_delay_seconds=5, persist_result=False)
        async def run_shard(number: int) -> collect.ShardReport:
            done[number] = 0  # a shard that is tried again counts anew

            def on_done(rollouts: int) -> None:
                done[number] += rollouts
                on_progress(done.total(), total)

            return await collect.run_shard(
                shards[number], uri=uri, flush_every=settings.collect.flush_every, attempt=attempt, on_done=on_done
            )

        return list(await asyncio.gather(*(run_shard(shard.number) for shard in shards)))


def _judge(reports: list[collect.ShardReport], allowed: float) -> None:
    """Raise when more rollouts failed than may."""
    planned = sum(report.planned for report in reports)
    failed: Counter[str] = Counter()
    for report in reports:
        failed.update(report.failed)
    if failed.total() > allowed * planned:
        reasons = ", ".join(f"{reason} {count}" for reason, count in failed.most_common())
        raise CollectError(
            f"{failed.total()} of {planned} rollouts failed ({reasons}); the others are kept: the same command again redoes "
            f"only these, and --allow-failed-share {failed.total() / planned:.2g} would do without them"
        )
