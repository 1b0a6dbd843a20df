"""The plan, the shards and the fold, on real storage, with attempts whose outcome each test decides."""

import asyncio
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks import artifact, collect, config, storage
from tasks.artifact import Artifact
from tasks.chosen import select
from tasks.collect import RolloutSpec, Shard
from tasks.errors import ArtifactError, InputError
from tasks.unwritten import Unwritten

QUESTION_IDS = [f"q{n}" for n in range(30)]


def _questions(root: str, ids: list[str] = QUESTION_IDS) -> Artifact:
    rows = [
        {"question_id": id_, "question": f"What is {id_}?", "answers": [["x"]], "split": ["train", "test"][n % 3 == 0]}
        for n, id_ in enumerate(ids)
    ]
    table = artifact.table_of(rows, "questions/1")
    return artifact.write_table(table, storage.join(root, "questions.parquet"), "questions/1", {})


def _row(spec: RolloutSpec, attempt: int, status: str = "finished", outcome: str = "answered") -> dict[str, object]:
    return {**asdict(spec), "attempt": attempt, "status": status, "outcome": outcome}


async def _finish(spec: RolloutSpec, attempt: int) -> dict[str, object]:
    await asyncio.sleep(0)
    return _row(spec, attempt)


def _shard(size: int = 10, number: int = 0) -> Shard:
    return Shard(number, tuple(RolloutSpec(f"r{number}-{n}", f"q{n}", "default", 0, n) for n in range(size)))


def _stored(uri: str) -> list[dict[str, object]]:
    return artifact.read_parts(uri, collect.SCHEMA).to_pylist()


# --- plan


@settings(max_examples=25, deadline=None)
@given(
    samples=st.integers(1, 3),
    names=st.lists(st.sampled_from(get_args(config.SamplingName)), min_size=1, max_size=3),
    size=st.integers(1, 9),
    limit=st.none() | st.integers(1, 40),
    order=st.permutations(QUESTION_IDS),
)
def test_plan_is_complete_distinct_and_independent_of_the_order_of_questions(
    tmp_path_factory: pytest.TempPathFactory, samples: int, names: list, size: int, limit: int | None, order: list[str]
) -> None:
    root = str(tmp_path_factory.mktemp("plan"))
    chosen = config.Collect(split="all", limit=limit, sampling_config=names, samples=samples, shard_size=size)
    shards = collect.plan(_questions(root), chosen, "key")
    assert shards == collect.plan(_questions(root, order), chosen, "key")
    rollouts = [s for shard in shards for s in shard.rollouts]
    expected = min(limit or 99, len(QUESTION_IDS)) * len(set(names)) * samples
    assert len({s.rollout_id for s in rollouts}) == len(rollouts) == expected
    assert len({(s.question_id, s.sampling, s.sample) for s in rollouts}) == expected
    assert all(0 <= s.seed < 2**31 for s in rollouts)
    asked = [{s.question_id for s in shard.rollouts} for shard in shards]
    assert [len(ids) for ids in asked[:-1]] == [size] * (len(shards) - 1)
    assert sum(map(len, asked)) == len(set().union(*asked))
    assert [s.number for s in shards] == list(range(len(shards)))


def test_more_samples_and_configurations_only_add_to_the_same_shards(tmp_path) -> None:
    questions = _questions(str(tmp_path))
    few = collect.plan(questions, config.Collect(shard_size=4, samples=2), "key")
    more = config.Collect(shard_size=4, samples=3, sampling_config=["diverse", "default"])
    many = collect.plan(questions, more, "key")
    assert [s.number for s in few] == [s.number for s in many]
    assert all(set(a.rollouts) < set(b.rollouts) for a, b in zip(few, many, strict=True))


def test_plan_takes_the_split_and_a_larger_limit_only_adds(tmp_path) -> None:
    questions = _questions(str(tmp_path))
    assert set(select(questions, "test", None)) == set(QUESTION_IDS[::3])
    few = collect.plan(questions, config.Collect(limit=5, samples=2), "key")[0].rollouts
    many = collect.plan(questions, config.Collect(limit=9, samples=2), "key")[0].rollouts
    assert many[: len(few)] == few
    assert {s.question_id for s in many} <= set(select(questions, "train", None))


def test_named_questions_are_asked_whatever_the_limit_in_the_shards_that_they_always_have(tmp_path) -> None:
    questions = _questions(str(tmp_path))
    settings = config.Collect(split="all", shard_size=4, samples=2)
    last = collect.plan(questions, settings, "key")[-1]
    named = last.rollouts[-1].question_id
    (one,) = collect.plan(questions, settings.model_copy(update={"limit": 1}), "key", only=[named])
    assert one == Shard(last.number, tuple(s for s in last.rollouts if s.question_id == named))
    assert select(questions, "all", 1, [named]) == [named]


def test_each_state_has_rollouts_of_its_own(tmp_path) -> None:
    settings = config.Collect(split="all", samples=2)
    began = {"q1": [None, "s1", "s2"], "q2": ["s3"]}
    shards = collect.plan(_questions(str(tmp_path)), settings, "key", began=began)
    rollouts = [s for shard in shards for s in shard.rollouts]
    states = [(question_id, state) for question_id, names in began.items() for state in names]
    assert Counter((s.question_id, s.state) for s in rollouts) == dict.fromkeys(states, 2)
    assert len({s.rollout_id for s in rollouts}) == len({s.seed for s in rollouts}) == 8


def test_another_run_or_seed_gives_other_ids_or_seeds(tmp_path) -> None:
    questions = _questions(str(tmp_path))
    first, other = (collect.plan(questions, config.Collect(), key)[0].rollouts for key in ("one", "two"))
    assert not {s.rollout_id for s in first} & {s.rollout_id for s in other}
    reseeded = collect.plan(questions, config.Collect(seed=1), "one")[0].rollouts
    assert [s.rollout_id for s in reseeded] == [s.rollout_id for s in first]
    assert not {s.seed for s in reseeded} & {s.seed for s in first}


# --- shards


async def test_a_shard_writes_a_part_after_every_so_many_rollouts(storage_root: str) -> None:
    told: list[int] = []
    report = await collect.run_shard(
        _shard(10), uri=storage_root, unwritten=Unwritten(4), attempt=_finish, on_done=told.append
    )
    assert (report.failed, report.tried_again) == ({}, 0)
    assert told == [0] + [1] * 10
    files = list(storage.iter_files(storage_root))
    assert 1 <= len(files) <= 3
    assert all("/shard-00000/part-001-" in f for f in files)
    assert sorted(r["rollout_id"] for r in _stored(storage_root)) == sorted(s.rollout_id for s in _shard(10).rollouts)


async def test_of_all_shards_together_fewer_than_so_many_rollouts_wait_to_be_written(storage_root: str) -> None:
    """None of the shards has as many for itself."""
    shards, unwritten, ended = [_shard(5, number) for number in range(6)], Unwritten(4), []

    async def first_two(spec: RolloutSpec, attempt: int) -> dict[str, object]:
        if spec.seed >= 2:
            await asyncio.Event().wait()
        ended.append(spec.rollout_id)
        return _row(spec, attempt)

    runs = [
        asyncio.create_task(collect.run_shard(s, uri=storage_root, unwritten=unwritten, attempt=first_two))
        for s in shards
    ]
    async with asyncio.timeout(60):
        while len(ended) < 12 or len(_stored(storage_root)) <= 12 - 4:
            await asyncio.sleep(0.02)
    for run in runs:
        run.cancel()
    await asyncio.gather(*runs, return_exceptions=True)
    assert {r["rollout_id"] for r in _stored(storage_root)} == set(ended)


async def test_a_second_run_does_nothing_and_touches_nothing(storage_root: str) -> None:
    await collect.run_shard(_shard(), uri=storage_root, unwritten=Unwritten(4), attempt=_finish)
    files = list(storage.iter_files(storage_root))

    async def never(spec: RolloutSpec, attempt: int) -> dict[str, object]:
        raise AssertionError(f"{spec} was done twice")

    told: list[int] = []
    report = await collect.run_shard(
        _shard(), uri=storage_root, unwritten=Unwritten(4), attempt=never, on_done=told.append
    )
    assert (report.failed, report.tried_again, told) == ({}, 0, [10])
    assert list(storage.iter_files(storage_root)) == files


async def test_failed_rollouts_are_rows_and_only_they_are_tried_again(storage_root: str) -> None:
    async def third_fails(spec: RolloutSpec, attempt: int) -> dict[str, object]:
        fails = spec.seed % 3 == 0 and attempt == 1
        return _row(spec, attempt, "failed", "connection") if fails else _row(spec, attempt)

    first = await collect.run_shard(_shard(), uri=storage_root, unwritten=Unwritten(4), attempt=third_fails)
    assert first.failed == {"connection": 4}
    second = await collect.run_shard(_shard(), uri=storage_root, unwritten=Unwritten(4), attempt=third_fails)
    assert (second.failed, second.tried_again) == ({}, 4)
    attempts = Counter((r["rollout_id"], r["attempt"], r["status"]) for r in _stored(storage_root))
    assert len(attempts) == 14
    assert attempts["r0-0", 2, "finished"] == attempts["r0-1", 1, "finished"] == 1


async def test_only_what_failed_for_a_given_reason_is_tried_again(tmp_path) -> None:
    async def fails(spec: RolloutSpec, attempt: int) -> dict[str, object]:
        outcome = {0: "connection", 1: "http_status"}.get(spec.seed) if attempt == 1 else None
        return _row(spec, attempt, "failed", outcome) if outcome else _row(spec, attempt)

    uri = str(tmp_path)
    await collect.run_shard(_shard(), uri=uri, unwritten=Unwritten(4), attempt=fails)
    again = await collect.run_shard(_shard(), uri=uri, unwritten=Unwritten(4), attempt=fails, again={"connection"})
    assert (again.failed, again.tried_again) == ({"http_status": 1}, 1)
    counts = Counter(row["status"] for row in collect.attempts_that_count(_shard(), uri).to_pylist())
    assert counts == {"finished": 9, "failed": 1}


async def test_cancelling_stores_what_was_finished(storage_root: str) -> None:
    done = asyncio.Event()

    async def half_hang(spec: RolloutSpec, attempt: int) -> dict[str, object]:
        if spec.seed >= 5:
            done.set()
            await asyncio.Event().wait()
        return _row(spec, attempt)

    shard_run = asyncio.create_task(
        collect.run_shard(_shard(), uri=storage_root, unwritten=Unwritten(100), attempt=half_hang)
    )
    await done.wait()
    shard_run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await shard_run
    assert {r["seed"] for r in _stored(storage_root)} == {0, 1, 2, 3, 4}
    told: list[int] = []
    await collect.run_shard(_shard(), uri=storage_root, unwritten=Unwritten(100), attempt=_finish, on_done=told.append)
    assert told == [5] + [1] * 5
    assert Counter(r["rollout_id"] for r in _stored(storage_root)) == {s.rollout_id: 1 for s in _shard().rollouts}


async def test_a_fault_in_the_code_ends_the_shard_and_keeps_what_was_finished(tmp_path) -> None:
    async def breaks(spec: RolloutSpec, attempt: int) -> dict[str, object]:
        if spec.seed == 7:
            raise ZeroDivisionError
        return _row(spec, attempt)

    with pytest.raises(ZeroDivisionError):
        await collect.run_shard(_shard(), uri=str(tmp_path), unwritten=Unwritten(100), attempt=breaks)
    assert {r["seed"] for r in _stored(str(tmp_path))} >= {0, 1, 2, 3, 4, 5, 6}


# --- fold


async def test_fold_has_one_row_a_rollout_in_the_order_of_the_plan(storage_root: str) -> None:
    shards = [_shard(10, n) for n in range(3)]

    async def uneven(spec: RolloutSpec, attempt: int) -> dict[str, object]:
        await asyncio.sleep((7 * spec.seed % 10) / 1000)
        fails = spec.seed == 3 or (spec.seed == 5 and attempt == 1)
        return _row(spec, attempt, "failed", "deadline") if fails else _row(spec, attempt)

    for _ in range(2):
        unwritten = Unwritten(3)
        runs = (collect.run_shard(s, uri=storage_root, unwritten=unwritten, attempt=uneven) for s in shards)
        await asyncio.gather(*runs)
    out = storage.join(storage_root, "out")
    first = collect.fold(shards, storage_root, out + "/a.parquet", artifact.provenance(prompt_fingerprint="p"))
    again = collect.fold(shards, storage_root, out + "/b.parquet", artifact.provenance(prompt_fingerprint="p"))
    assert (first.sha256, first.rows) == (again.sha256, 30)
    assert artifact.read_provenance(first)["prompt_fingerprint"] == "p"
    rows = artifact.read_rows(first)
    assert [r["rollout_id"] for r in rows] == [s.rollout_id for shard in shards for s in shard.rollouts]
    assert {(r["seed"], r["attempt"], r["status"]) for r in rows if r["seed"] in (2, 3, 5)} == {
        (2, 1, "finished"),
        (3, 2, "failed"),
        (5, 2, "finished"),
    }


async def test_two_runs_at_once_leave_one_row_a_rollout(storage_root: str) -> None:
    runs = (collect.run_shard(_shard(), uri=storage_root, unwritten=Unwritten(2), attempt=_finish) for _ in range(2))
    reports = await asyncio.gather(*runs)
    assert [r.failed for r in reports] == [{}, {}]
    folded = collect.fold([_shard()], storage_root, storage.join(storage_root, "out.parquet"), {})
    assert [r["rollout_id"] for r in artifact.read_rows(folded)] == [s.rollout_id for s in _shard().rollouts]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 3), st.booleans()), min_size=1))
def test_the_attempt_that_counts_is_the_first_finished_else_the_last_failed(
    stored: list[tuple[str, int, bool]],
) -> None:
    rows = [
        {"rollout_id": id_, "attempt": attempt, "status": "finished" if finished else "failed"}
        for id_, attempt, finished in stored
    ]
    best = collect._best_attempts(artifact.table_of(rows, collect.SCHEMA))
    assert set(best) == {id_ for id_, *_ in stored}
    for id_, row in best.items():
        finished = [attempt for other, attempt, ok in stored if other == id_ and ok]
        failed = [attempt for other, attempt, ok in stored if other == id_ and not ok]
        assert stored[row] == (id_, min(finished), True) if finished else (id_, max(failed), False)


async def test_fold_refuses_a_run_that_has_not_ended(tmp_path) -> None:
    await collect.run_shard(_shard(10, 0), uri=str(tmp_path), unwritten=Unwritten(4), attempt=_finish)
    with pytest.raises(ArtifactError, match=r"shard 1 .* lacks 10 of 10"):
        collect.fold([_shard(10, 0), _shard(10, 1)], str(tmp_path), str(tmp_path / "out.parquet"), {})


async def test_forgotten_rollouts_start_again_and_no_others(storage_root: str) -> None:
    whole, other = _shard(10, 0), _shard(10, 1)
    for shard in (whole, other):
        await collect.run_shard(shard, uri=storage_root, unwritten=Unwritten(4), attempt=_finish)
    some = Shard(0, whole.rollouts[:5])  # all of one part, one of another's, none of the last one's
    collect.forget([some], storage_root)
    kept = {row["rollout_id"] for row in _stored(storage_root)}
    assert kept == {spec.rollout_id for spec in (*whole.rollouts[5:], *other.rollouts)}
    again: list[str] = []

    async def noted(spec: RolloutSpec, attempt: int) -> dict[str, object]:
        again.append(spec.rollout_id)
        return await _finish(spec, attempt)

    for shard in (whole, other):
        await collect.run_shard(shard, uri=storage_root, unwritten=Unwritten(4), attempt=noted)
    assert again == [spec.rollout_id for spec in some.rollouts]
    collect.forget([whole, other], storage_root)
    assert not list(storage.iter_files(storage_root))


async def test_what_cannot_be_read_is_forgotten(tmp_path: Path) -> None:
    await collect.run_shard(_shard(), uri=str(tmp_path), unwritten=Unwritten(4), attempt=_finish)
    next(tmp_path.rglob("*.parquet")).write_bytes(b"PAR1")
    collect.forget([_shard(5)], str(tmp_path))
    assert {row["rollout_id"] for row in _stored(str(tmp_path))} < {spec.rollout_id for spec in _shard().rollouts}


def test_a_split_without_questions_is_told_with_what_the_others_hold(tmp_path) -> None:
    questions = _questions(str(tmp_path))
    none_for_dev = select(questions, "all", None)
    assert none_for_dev
    with pytest.raises(InputError, match=r"no question is in split 'dev' \(train: \d+, dev: 0, test: \d+\)"):
        collect.plan(questions, config.Collect(split="dev"), "key")
