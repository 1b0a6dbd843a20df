r"""What a night of collection costs and how long it takes, with training on what it gathered and the storage of both.

With throughput from the serving host's speed, as vLLM's own log or `vllm bench serve` tells it:

    python -m tasks.cost --questions 2000 --samples 4 --turns 4 --prompt-tokens 2500 --cached-share 0.7 \
        --completion-tokens 400 --prefill-tokens-per-s 20000 --decode-tokens-per-s 2500 --rollout-bytes 9000 \
        --serving-price 4.5 --storage-price 0.023 --put-price 0.005 --get-price 0.0004

(the last four are examples, not what anyone asks for). With what a run of your own measured, in place of the tokens and speeds:

    python -m tasks.cost --questions 2000 --samples 4 --trajectories trajectories --storage drag-data \
        --serving-price 4.5 --storage-price 0.023 --put-price 0.005 --get-price 0.0004

`--trajectories` is a reference below `--storage` (such as `trajectories`) or the address of a .parquet file. A flag that is
given goes before what was measured.

Prices are demanded, never assumed: they differ by region, contract and day, and a table in this file would go wrong without
anyone noticing. Zero is a price, too: of a machine of your own. Any currency will do.
"""

import hashlib
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator
from rich.console import Console
from rich.table import Table

from tasks import artifact, collect, config, refs, storage
from tasks.artifact import Artifact
from tasks.collect_events import Amount, Positive
from tasks.errors import ArtifactError
from tasks.simulate import exit_code, flags, validated

_PARTS = 8  # parts that are made again to learn how large they are
_MEASURED = (
    "turns",
    "prompt_tokens",
    "completion_tokens",
    "rollout_bytes",
    "parts_share",
    "redone_share",
    "rollouts_per_s",
)
_SPEED = {"turns", "prompt_tokens", "completion_tokens", "prefill_tokens_per_s", "decode_tokens_per_s"}


class Night(config.Settings):
    """A night's work, what does it, and what that costs. Every price is in the same currency."""

    questions: int = Field(ge=1, description="Questions.")
    samples: int = Field(default=1, ge=1, description="Rollouts of each question under each sampling configuration.")
    sampling_configs: int = Field(default=1, ge=1, description="Sampling configurations.")
    redone_share: Amount = Field(
        default=0.0,
        description="Rollouts done again after failures and kills, over the rollouts that finished; tasks.simulate tells it.",
    )

    turns: Positive = Field(description="Model calls that a rollout makes, on average.")
    prompt_tokens: Positive = Field(description="Tokens of a call's prompt, on average over the turns.")
    completion_tokens: Positive = Field(description="Tokens that a call generates, on average.")
    rollout_bytes: Positive = Field(
        description="Bytes that a rollout takes in storage: in its part and in the folded file."
    )
    parts_share: config.Share = Field(default=0.5, description="Share of these bytes that lie in parts.")

    cached_share: config.Share = Field(default=0.0, description="Share of prompt tokens that the prefix cache holds.")
    prefill_tokens_per_s: Positive | None = Field(
        default=None, description="Prompt tokens a second that one server reads, of those that are not cached."
    )
    decode_tokens_per_s: Positive | None = Field(
        default=None, description="Tokens a second that one server generates, all its sequences together."
    )
    rollouts_per_s: Positive | None = Field(
        default=None, description="Rollouts a second that one server was measured to do; replaces the two speeds."
    )
    servers: int = Field(default=1, ge=1, description="Serving hosts.")
    serving_price: Amount = Field(description="Price of one serving host for an hour.")
    startup_s: Amount = Field(default=0.0, description="Seconds that a serving host is paid for before it answers.")

    examples: int = Field(default=0, ge=0, description="Training examples; 0: the night trains nothing.")
    example_tokens: Positive | None = Field(default=None, description="Tokens of an example, on average.")
    epochs: Positive = Field(default=config.Finetune().epochs, description="Passes over the examples.")
    training_tokens_per_s: Positive | None = Field(
        default=None, description="Tokens a second of the whole training host."
    )
    training_price: Amount | None = Field(default=None, description="Price of the training host for an hour.")

    shard_size: int = Field(default=config.Collect().shard_size, ge=1, description="Questions in a shard.")
    part_rollouts: int = Field(
        default=64, ge=1, description="Rollouts in a part, as in most; a shard's last has the rest."
    )
    storage_price: Amount = Field(description="Price of a gigabyte (10^9 bytes) in storage for a month.")
    put_price: Amount = Field(description="Price of 1,000 PUT or LIST requests.")
    get_price: Amount = Field(description="Price of 1,000 GET requests.")

    @model_validator(mode="after")
    def _speed_and_training(self) -> "Night":
        if self.rollouts_per_s is None and None in (self.prefill_tokens_per_s, self.decode_tokens_per_s):
            raise ValueError("give --prefill-tokens-per-s and --decode-tokens-per-s, or --rollouts-per-s")
        if self.examples and None in (self.example_tokens, self.training_tokens_per_s, self.training_price):
            raise ValueError("--examples needs --example-tokens, --training-tokens-per-s and --training-price")
        return self

    @property
    def rollouts(self) -> int:
        """Rollouts that the night yields."""
        return self.questions * self.samples * self.sampling_configs


@dataclass(frozen=True)
class Bill:
    """What a night takes. Costs are in the currency of its prices, sizes in bytes."""

    rollouts: int
    calls: float
    prompt_tokens: float  # sent, whether cached or not
    computed_prompt_tokens: float  # not cached
    completion_tokens: float
    collect_hours: float
    serving_cost: float
    training_tokens: float
    training_hours: float
    training_cost: float
    stored_bytes: float
    storage_cost: float  # a month
    puts: int  # and lists
    gets: int
    request_cost: float

    @property
    def total(self) -> float:
        """The night, with the first month of what it stored."""
        return self.serving_cost + self.training_cost + self.storage_cost + self.request_cost


def bill(night: Night) -> Bill:
    """What a night takes.

    A server's time is prompt tokens that are not cached / prefill speed + generated tokens / decode speed: reading and
    generating share the same processor. With a measured `rollouts_per_s` it is rollouts / that.
    """
    done = night.rollouts * (1 + night.redone_share)
    calls = done * night.turns
    computed = calls * night.prompt_tokens * (1 - night.cached_share)
    completion = calls * night.completion_tokens
    if night.rollouts_per_s is not None:
        server_s = done / night.rollouts_per_s
    else:
        assert night.prefill_tokens_per_s is not None
        assert night.decode_tokens_per_s is not None
        server_s = computed / night.prefill_tokens_per_s + completion / night.decode_tokens_per_s
    hours = (server_s / night.servers + night.startup_s) / 3600

    training_tokens = night.examples * (night.example_tokens or 0.0) * night.epochs
    training_hours = training_tokens / (night.training_tokens_per_s or 1.0) / 3600

    puts, gets = requests(night)
    stored = night.rollouts * night.rollout_bytes * (1 + night.redone_share * night.parts_share)
    return Bill(
        rollouts=night.rollouts,
        calls=calls,
        prompt_tokens=calls * night.prompt_tokens,
        computed_prompt_tokens=computed,
        completion_tokens=completion,
        collect_hours=hours,
        serving_cost=hours * night.servers * night.serving_price,
        training_tokens=training_tokens,
        training_hours=training_hours,
        training_cost=training_hours * (night.training_price or 0.0),
        stored_bytes=stored,
        storage_cost=stored / 1e9 * night.storage_price,
        puts=puts,
        gets=gets,
        request_cost=(puts * night.put_price + gets * night.get_price) / 1000,
    )


def requests(night: Night) -> tuple[int, int]:
    """PUT and LIST requests, and GET requests, of a collection that nothing disturbs.

    The first shard's folder is listed to see whether anything is left to do. Each shard's is listed at its start and again in the
    fold, which gets each part. The file and its reference are put; whoever reads them next lists and gets both once.
    """
    of_question = night.samples * night.sampling_configs
    full, rest = divmod(night.questions, night.shard_size)
    parts = full * -(-night.shard_size * of_question // night.part_rollouts)
    parts += -(-rest * of_question // night.part_rollouts)
    return parts + 1 + 2 * (full + (rest > 0)) + 2 + 2, parts + 2


# ---- measured


def measured(trajectories: str, root: str) -> dict[str, float]:
    """What a stored collection says of its own turns, tokens, speed and size, by the names of `Night`'s fields.

    The speed is that of whatever served the run, counted as one server that was busy all the time. By Little's law (1961) it
    is the rollouts in flight, which are the `concurrency` in the file's provenance, over the mean seconds of one. Rollouts that
    failed took time and yield nothing: they are `redone_share`. What was cached is not recorded; it is in the speed. Tokens are
    left out where the server told of none.

    Args:
        trajectories: the address of a .parquet file, or the name of a reference below `root`.

    Raises:
        ArtifactError: it is missing, of another schema, or holds no finished rollout.
    """
    found = _artifact(trajectories) if trajectories.endswith(".parquet") else refs.load_ref(root, trajectories)
    table = artifact.read_table(found, ["status", "turns", "prompt_tokens", "completion_tokens", "elapsed_s"])
    finished = table.filter(pc.equal(table["status"], "finished"))
    turns = pc.sum(pc.list_value_length(finished["turns"])).as_py()
    if not turns:
        raise ArtifactError(f"{found.uri} holds no finished rollout to measure: collect first")
    settings = artifact.read_provenance(found).get("settings", {})
    concurrency = settings.get("server", {}).get("concurrency")
    folded = len(storage.read_bytes(found.uri)) / table.num_rows
    part = _part_bytes(found, config.Collect.model_validate(settings.get("collect", {})), concurrency)
    values = {
        "turns": turns / finished.num_rows,
        **_tokens(finished),
        "rollout_bytes": folded + part,
        "parts_share": part / (folded + part),
        "redone_share": table.num_rows / finished.num_rows - 1,
    }
    if concurrency and (seconds := pc.sum(table["elapsed_s"]).as_py()):
        values["rollouts_per_s"] = min(concurrency, table.num_rows) * table.num_rows / seconds
    return values


def _tokens(finished: pa.Table) -> dict[str, float]:
    """Tokens of a call, over the rollouts whose tokens the server told."""
    found = {}
    for name in ("prompt_tokens", "completion_tokens"):
        told = finished.filter(pc.is_valid(finished[name]))
        if turns := pc.sum(pc.list_value_length(told["turns"])).as_py():
            found[name] = pc.sum(told[name]).as_py() / turns
    return found


def _artifact(uri: str) -> Artifact:
    data = storage.read_bytes(uri)
    return Artifact(uri, hashlib.sha256(data).hexdigest(), 0, collect.SCHEMA)


def _part_bytes(trajectories: Artifact, collected: config.Collect, concurrency: int | None) -> float:
    """Bytes a rollout of the parts that a file was folded from: the first of them, made again, as large as they may be."""
    shard = collected.shard_size * collected.samples * len(collected.sampling_config)
    size = min(shard, collected.flush_every or concurrency or shard)
    table = next(artifact.read_batches(trajectories, rows=_PARTS * size))
    with tempfile.TemporaryDirectory() as folder:
        for at in range(0, table.num_rows, size):
            artifact.write_table(table.slice(at, size), f"{folder}/{at}.parquet", collect.SCHEMA, {})
        return sum(len(storage.read_bytes(file)) for file in storage.iter_files(folder)) / table.num_rows


# ---- command


def bill_table(found: Bill) -> Table:
    """A bill, as people read it."""
    shown = Table(title=f"{found.rollouts:,} rollouts", title_justify="left")
    shown.add_column("")
    shown.add_column("takes", justify="right")
    shown.add_column("costs", justify="right")
    shown.add_column("that is")
    tokens = (
        f"{found.calls:,.0f} calls, {found.prompt_tokens:,.0f} prompt tokens, {found.completion_tokens:,.0f} generated"
    )
    stored = f"{found.stored_bytes / 1e9:,.3f} GB"
    rows = [
        ("collection", f"{found.collect_hours:,.2f} h", found.serving_cost, tokens),
        ("training", f"{found.training_hours:,.2f} h", found.training_cost, f"{found.training_tokens:,.0f} tokens"),
        ("storage", stored, found.storage_cost, "a month, parts and folded file"),
        ("requests", "", found.request_cost, f"{found.puts:,} PUT and LIST, {found.gets:,} GET"),
        ("all", "", found.total, f"{found.total / found.rollouts * 1000:,.2f} for 1,000 rollouts"),
    ]
    for what, takes, costs, note in rows:
        shown.add_row(what, takes, _money(costs), note, end_section=what == "requests")
    return shown


def _money(amount: float) -> str:
    return f"{amount:,.2f}" if amount >= 0.01 or not amount else f"{amount:.2g}"


def night_of(values: Mapping[str, str], trajectories: str | None, root: str) -> Night:
    """The night that flags describe, completed by what was measured.

    A measured speed holds for the rollouts that it was measured with: it is left out when a flag says how long they are, or
    how fast the server is.

    Raises:
        ConfigError: a value is missing or out of range.
        ArtifactError: the trajectories cannot be read.
    """
    found = measured(trajectories, root) if trajectories else {}
    if _SPEED & values.keys():
        found.pop("rollouts_per_s", None)
    return validated(Night, {**found, **values})


def main(argv: Sequence[str] | None = None) -> int:
    """Print what the night that the flags describe takes; returns the exit code."""
    parser = flags(Night, __doc__ or "", given=_MEASURED)
    parser.add_argument(
        "--trajectories", default=None, metavar="REF", help="Measured: a reference, or a .parquet file."
    )
    parser.add_argument("--storage", default="drag-data", metavar="ROOT", help="Storage root of the reference.")
    values = vars(parser.parse_args(argv))
    trajectories, root = values.pop("trajectories"), values.pop("storage")

    def work() -> None:
        night = night_of(values, trajectories, storage.resolve(root))
        if trajectories:
            shown = ", ".join(f"{name} {getattr(night, name):.4g}" for name in _MEASURED if getattr(night, name))
            Console().print(f"From {trajectories}: {shown}", markup=False, soft_wrap=True)
        Console().print(bill_table(bill(night)))

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
