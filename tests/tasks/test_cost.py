"""The bill of a night: what follows from its arithmetic, what a stored collection measures, and the command."""

import asyncio
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks import artifact, collect, config, cost, refs, simulate, storage
from tasks.artifact import Artifact
from tasks.collect import RolloutSpec, Shard
from tasks.collect_events import Flow
from tasks.cost import Night, bill
from tasks.errors import ArtifactError, ConfigError
from tasks.unwritten import Unwritten

PRICES = {"serving_price": 2.0, "storage_price": 0.02, "put_price": 0.005, "get_price": 0.0004}
LENGTHS = {"turns": 4, "prompt_tokens": 2000, "completion_tokens": 300, "rollout_bytes": 9000}
SPEEDS = {"prefill_tokens_per_s": 20_000, "decode_tokens_per_s": 2_000}
NIGHT = Night(questions=1000, samples=4, **LENGTHS, **SPEEDS, **PRICES)

amounts = st.floats(0.001, 1e6)
nights = st.builds(
    Night,
    questions=st.integers(1, 10**6),
    samples=st.integers(1, 16),
    sampling_configs=st.integers(1, 6),
    redone_share=st.floats(0, 1),
    turns=amounts,
    prompt_tokens=amounts,
    completion_tokens=amounts,
    rollout_bytes=amounts,
    cached_share=st.floats(0, 0.99),
    prefill_tokens_per_s=amounts,
    decode_tokens_per_s=amounts,
    servers=st.integers(1, 100),
    serving_price=amounts,
    startup_s=st.floats(0, 1000),
    examples=st.integers(0, 10**6),
    example_tokens=amounts,
    training_tokens_per_s=amounts,
    training_price=amounts,
    storage_price=amounts,
    put_price=amounts,
    get_price=amounts,
)


def _with(night: Night, **changes: Any) -> Night:
    return Night(**{**night.model_dump(), **changes})


# --- arithmetic


def test_a_night_worked_out_by_hand() -> None:
    found = bill(_with(NIGHT, cached_share=0.5, examples=1000, example_tokens=500, epochs=3, **_training()))
    assert (found.rollouts, found.calls) == (4000, 16_000)
    assert (found.prompt_tokens, found.computed_prompt_tokens) == (32e6, 16e6)
    assert found.completion_tokens == 4.8e6
    assert found.collect_hours == pytest.approx((16e6 / 20_000 + 4.8e6 / 2_000) / 3600)
    assert found.serving_cost == pytest.approx(2 * found.collect_hours)
    assert (found.training_tokens, found.training_hours) == (1.5e6, pytest.approx(1.5e6 / 1000 / 3600))
    assert found.stored_bytes == 36e6
    assert found.storage_cost == pytest.approx(0.036 * 0.02)
    assert (found.puts, found.gets) == (63 + 1 + 2 * 63 + 2 + 2, 63 + 2)  # 62 shards of 64, one of 32


def test_a_night_of_which_a_part_is_done_again_worked_out_by_hand() -> None:
    found = bill(_with(NIGHT, redone_share=0.25, parts_share=0.4, servers=2, startup_s=180))
    assert found.stored_bytes == pytest.approx(36e6 * (1 + 0.25 * 0.4))  # what was done again lies in parts alone
    assert found.calls == 20_000
    seconds = (40e6 / 20_000 + 6e6 / 2_000) / 2 + 180  # every server starts
    assert found.collect_hours == pytest.approx(seconds / 3600)
    assert found.serving_cost == pytest.approx(2 * 2 * seconds / 3600)
    assert found.request_cost == pytest.approx((found.puts * 0.005 + found.gets * 0.0004) / 1000)


def _training() -> dict[str, float]:
    return {"training_tokens_per_s": 1000.0, "training_price": 30.0}


@settings(deadline=None)
@given(
    night=nights,
    name=st.sampled_from(
        [
            *(
                "questions",
                "samples",
                "sampling_configs",
                "turns",
                "prompt_tokens",
                "completion_tokens",
                "rollout_bytes",
            ),
            *(
                "redone_share",
                "startup_s",
                "serving_price",
                "storage_price",
                "put_price",
                "get_price",
                "examples",
                "epochs",
            ),
            *("example_tokens", "training_price"),
        ]
    ),
)
def test_more_work_and_higher_prices_never_cost_less(night: Night, name: str) -> None:
    more, less = bill(_with(night, **{name: getattr(night, name) + 1})), bill(night)
    assert more.total >= less.total * (1 - 1e-12)
    assert more.collect_hours >= less.collect_hours * (1 - 1e-12)


@settings(deadline=None)
@given(night=nights, name=st.sampled_from(["prefill_tokens_per_s", "decode_tokens_per_s", "training_tokens_per_s"]))
def test_faster_hosts_never_cost_more(night: Night, name: str) -> None:
    assert bill(_with(night, **{name: getattr(night, name) * 2})).total <= bill(night).total * (1 + 1e-12)


@settings(deadline=None)
@given(night=nights, servers=st.integers(1, 50))
def test_more_servers_take_less_time_for_the_same_price_but_for_their_start(night: Night, servers: int) -> None:
    one, many = (bill(_with(night, servers=n, startup_s=0)) for n in (1, servers))
    assert many.serving_cost == pytest.approx(one.serving_cost)
    assert many.collect_hours == pytest.approx(one.collect_hours / servers)


@settings(deadline=None)
@given(night=nights)
def test_the_parts_of_a_bill_add_up_and_are_finite(night: Night) -> None:
    found = bill(night)
    amounts = [found.serving_cost, found.training_cost, found.storage_cost, found.request_cost]
    assert all(0 <= amount < math.inf for amount in amounts)
    assert found.total == pytest.approx(sum(amounts))
    assert found.computed_prompt_tokens <= found.prompt_tokens


@settings(max_examples=30, deadline=None)
@given(
    questions=st.integers(1, 60),
    samples=st.integers(1, 4),
    shard_size=st.integers(1, 20),
    part_rollouts=st.integers(1, 20),
)
def test_as_many_parts_are_paid_for_as_are_simulated(
    questions: int, samples: int, shard_size: int, part_rollouts: int
) -> None:
    """Where one rollout is under way at a time, so that a part holds as many as may wait."""
    shape = {"samples": samples, "shard_size": shard_size}
    server = {"turns": 1, "service_s": 1, "servers": 1, "sequences": 1, "concurrency": 1, "put_s": 0.0}
    flow = Flow(rollouts=questions * samples, flush_every=part_rollouts, **shape, **server)
    parts = simulate.simulate(flow).counts.parts
    paid = cost.requests(_with(NIGHT, questions=questions, part_rollouts=part_rollouts, **shape))
    assert paid[1] == parts + 2


def test_as_many_requests_are_paid_for_as_a_collection_sends(s3_root: str) -> None:
    """From the look at what is left to the first who reads what was made."""
    shards = [Shard(n, tuple(RolloutSpec(f"r{n}-{m}", "q", "default", 0, m) for m in range(3))) for n in range(20)]
    sent: Counter[str] = Counter()

    def count(model: Any, **_: Any) -> None:
        sent[model.name] += 1

    events = storage._client().meta.events
    events.register("before-call.s3", count)
    try:
        for shard in collect.unfinished(shards, f"{s3_root}/run"):
            asyncio.run(collect.run_shard(shard, uri=f"{s3_root}/run", unwritten=Unwritten(9), attempt=_attempt))
        made = collect.fold(shards, f"{s3_root}/run", f"{s3_root}/trajectories.parquet", {})
        refs.save_ref(s3_root, "trajectories", made)
        artifact.read_table(refs.load_ref(s3_root, "trajectories"))
    finally:
        events.unregister("before-call.s3", count)
    puts, gets = cost.requests(_with(NIGHT, questions=60, samples=1, shard_size=3, part_rollouts=9))
    assert (puts, gets) == (sent["PutObject"] + sent["ListObjectsV2"], sent["GetObject"])
    assert sent.total() == puts + gets


def test_a_measured_speed_replaces_tokens_a_second() -> None:
    found = bill(_with(NIGHT, prefill_tokens_per_s=None, decode_tokens_per_s=None, rollouts_per_s=2.0, servers=4))
    assert found.collect_hours == pytest.approx(4000 / 2 / 4 / 3600)


# --- measured


def _turn(prompt: int, completion: int) -> dict[str, Any]:
    return {"turn": 1, "raw_text": "So.", "prompt_tokens": prompt, "completion_tokens": completion, "latency_s": 0.5}


async def _attempt(spec: RolloutSpec, number: int) -> dict[str, Any]:
    """Every fifth rollout fails in its first turn; the others take two turns and four seconds."""
    shared = {"rollout_id": spec.rollout_id, "question_id": spec.question_id, "attempt": number, "seed": spec.seed}
    if spec.seed % 5 == 4:
        return {**shared, "status": "failed", "outcome": "connection", "turns": [], "elapsed_s": 9.0}
    turns = [_turn(100, 10), _turn(300, 30)]
    done = {"status": "finished", "outcome": "answered", "turns": turns, "elapsed_s": 4.0}
    return {**shared, **done, "prompt_tokens": 400, "completion_tokens": 40}


def _collected(root: str) -> Artifact:
    """A real run of a shard in two parts, and its fold, with the provenance that a collection has."""
    shard = Shard(0, tuple(RolloutSpec(f"r{n}", f"q{n}", "default", 0, n) for n in range(30)))
    asyncio.run(collect.run_shard(shard, uri=f"{root}/run", unwritten=Unwritten(16), attempt=_attempt))
    chosen = config.Collect(shard_size=30, flush_every=16)
    settings = config.CollectRun(collect=chosen, server=config.Server(base_url="http://x/v1", concurrency=8))
    dumped = settings.model_dump(
        mode="json", exclude={"storage": True, "server": {"base_url"}}
    )  # as tasks/collect_run.py
    made = collect.fold([shard], f"{root}/run", f"{root}/out.parquet", artifact.provenance(settings=dumped))
    refs.save_ref(root, "trajectories", made)
    return made


def test_a_stored_collection_tells_its_own_turns_tokens_speed_and_size(storage_root: str) -> None:
    made = _collected(storage_root)
    found = cost.measured("trajectories", storage_root)
    assert (found["turns"], found["prompt_tokens"], found["completion_tokens"]) == (2.0, 200.0, 20.0)
    assert found["redone_share"] == pytest.approx(6 / 24)
    assert found["rollouts_per_s"] == pytest.approx(8 / ((24 * 4 + 6 * 9) / 30))
    assert found == cost.measured(made.uri, "nowhere")
    folded = len(storage.read_bytes(made.uri)) / 30
    assert found["rollout_bytes"] * (1 - found["parts_share"]) == pytest.approx(folded)
    files = [f for f in storage.iter_files(f"{storage_root}/run") if f.endswith(".parquet")]
    parts = sum(len(storage.read_bytes(file)) for file in files) / 30
    assert found["rollout_bytes"] * found["parts_share"] == pytest.approx(parts, rel=0.05)


def test_tokens_that_a_server_did_not_tell_are_not_measured(tmp_path: Path) -> None:
    row = {"status": "finished", "turns": [_turn(0, 0)] * 2, "elapsed_s": 1.0}
    told = {"prompt_tokens": 400, "completion_tokens": None}
    rows = [{**row, "rollout_id": "a", **told}, {**row, "rollout_id": "b"}]
    table = artifact.table_of(rows, collect.SCHEMA)
    found = cost.measured(artifact.write_table(table, f"{tmp_path}/t.parquet", collect.SCHEMA, {}).uri, str(tmp_path))
    assert (found["prompt_tokens"], "completion_tokens" in found) == (200, False)


def test_a_night_of_what_was_measured_takes_as_long_as_it_took(tmp_path: Path) -> None:
    _collected(str(tmp_path))
    night = cost.night_of({"questions": "24", **{k: str(v) for k, v in PRICES.items()}}, "trajectories", str(tmp_path))
    assert bill(night).collect_hours * 3600 == pytest.approx((24 * 4 + 6 * 9) / 8)


def test_a_flag_goes_before_what_was_measured(tmp_path: Path) -> None:
    _collected(str(tmp_path))
    values = {"questions": "24", **{k: str(v) for k, v in PRICES.items()}}
    assert cost.night_of({**values, "redone_share": "0"}, "trajectories", str(tmp_path)).redone_share == 0
    with pytest.raises(ConfigError, match="--rollouts-per-s"):  # the speed was that of shorter rollouts
        cost.night_of({**values, "turns": "9"}, "trajectories", str(tmp_path))
    speeds = {name: str(value) for name, value in SPEEDS.items()}
    night = cost.night_of({**values, "turns": "9", **speeds}, "trajectories", str(tmp_path))
    assert (night.turns, night.rollouts_per_s) == (9, None)


def test_what_cannot_be_measured_says_so(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="holds no trajectories yet"):
        cost.measured("trajectories", str(tmp_path))
    with pytest.raises(ArtifactError, match="does not exist"):
        cost.measured(f"{tmp_path}/none.parquet", str(tmp_path))
    failed = artifact.table_of([{"rollout_id": "r", "status": "failed", "turns": [], "elapsed_s": 1.0}], collect.SCHEMA)
    made = artifact.write_table(failed, f"{tmp_path}/failed.parquet", collect.SCHEMA, {})
    with pytest.raises(ArtifactError, match="no finished rollout"):
        cost.measured(made.uri, str(tmp_path))


# --- the command


def _flags(values: dict[str, Any]) -> list[str]:
    return [text for name, value in values.items() for text in (f"--{name.replace('_', '-')}", str(value))]


def test_the_command_prints_a_bill(capsys: pytest.CaptureFixture[str]) -> None:
    assert cost.main(_flags({"questions": 1000, "samples": 4, **LENGTHS, **SPEEDS, **PRICES})) == 0
    said = capsys.readouterr().out
    assert "4,000 rollouts" in said
    assert f"{bill(NIGHT).serving_cost:.2f}" in said


def test_the_command_says_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _collected(str(tmp_path))
    arguments = [*_flags({"questions": 40, **PRICES}), "--trajectories", "trajectories", "--storage", str(tmp_path)]
    assert cost.main(arguments) == 0
    assert "From trajectories: turns 2, prompt_tokens 200" in capsys.readouterr().out


@pytest.mark.parametrize("price", sorted(PRICES))
def test_every_price_is_demanded(price: str, capsys: pytest.CaptureFixture[str]) -> None:
    rest = {name: value for name, value in PRICES.items() if name != price}
    assert cost.main(_flags({"questions": 1, **LENGTHS, **SPEEDS, **rest})) == 2
    assert f"--{price.replace('_', '-')}: Field required" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"examples": 5}, "settings: --examples needs --example-tokens"),
        ({"serving_price": -1}, "--serving-price: Input should be"),
        ({"serving_price": "inf"}, "--serving-price: Input should be a finite number"),
        ({"cached_share": 2}, "--cached-share: Input should be"),
        ({"trajectories": "none", "storage": "nowhere"}, "holds no none yet"),
    ],
)
def test_bad_settings_end_with_a_code_and_no_traceback(
    wrong: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = cost.main(_flags({"questions": 1, **LENGTHS, **SPEEDS, **PRICES, **wrong}))
    assert code == (3 if "trajectories" in wrong else 2)
    shown = capsys.readouterr().err
    assert said in shown
    assert "Traceback" not in shown
