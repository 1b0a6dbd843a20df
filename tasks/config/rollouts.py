"""Settings of rollouts: which are run, what is kept of them, which training sets they become."""

import zoneinfo
from datetime import date
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from tasks.config.base import Settings, Share, Split
from tasks.config.serving import SamplingName

Source = Literal["trajectories", "mined", "both"]
RewardName = Literal["linear", "reciprocal", "ndcg"]
FormatName = Literal["sft_best", "sft_trajectory", "sft_context", "dpo", "reward"]


def _night(value: str) -> str:
    if value != "scheduled":
        try:
            value = date.fromisoformat(value).isoformat()
        except ValueError as error:
            raise ValueError("neither 'scheduled' nor a date such as 2026-11-24") from error
    return value


def _time_zone(name: str) -> str:
    try:
        zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise ValueError("no time zone of the IANA database, such as Europe/Berlin or UTC") from error
    return name


class Collect(Settings):
    """Questions × sampling configurations × samples → trajectories."""

    split: Split = Field(default="train", description="Which questions.")
    order: Literal["hash", "new-and-hardest"] = Field(
        default="hash",
        description="Which questions come first. 'hash': an order fixed by hash. 'new-and-hardest': those that no earlier night asked, then those whose searches scored lowest on earlier nights.",
    )
    limit: int | None = Field(default=None, ge=1, description="Take only the first so many questions, in that order.")
    dt: Annotated[str, AfterValidator(_night)] | None = Field(
        default=None,
        title="Night",
        description="Night that the collection belongs to: a date, or 'scheduled' for the day that the run was scheduled for. Another night asks again, for new samples; empty belongs to none.",
    )
    time_zone: Annotated[str, AfterValidator(_time_zone)] = Field(
        default="UTC", description="IANA name of the time zone whose day 'scheduled' means, such as Europe/Berlin."
    )
    sampling_config: list[SamplingName] = Field(
        default=["default"],
        min_length=1,
        title="Sampling configurations",
        description="Sampling configurations to run, each on every question.",
    )
    samples: int = Field(default=1, ge=1, description="Rollouts of each question under each sampling configuration.")
    seed: int = Field(default=0, description="Base of every rollout's seed.")
    shard_size: int = Field(
        default=16, ge=1, description="Questions in one shard, a task run. Keep it, to go on later."
    )
    flush_every: int | None = Field(
        default=None,
        ge=1,
        description="When so many finished rollouts wait, a part is written: a kill loses fewer. As many as concurrency when empty.",
    )
    resume: bool = Field(
        default=True,
        description="Go on from what an earlier run finished; otherwise collect again what this one chooses, and keep the rest.",
    )
    allow_failed_share: Share = Field(default=0.0, description="Share of rollouts that may fail before the run does.")
    notify_failed_share: Share = Field(
        default=0.05, description="Share of failed rollouts above which the event drag.collect.failed-share is sent."
    )

    @model_validator(mode="after")
    def _has_earlier_nights(self) -> "Collect":
        if self.order == "new-and-hardest" and self.dt is None:
            raise ValueError("order new-and-hardest compares with earlier nights: say which night this is by dt")
        return self


class Mine(Collect):
    """States × sampling configurations × samples → queries, each scored by what a search for it finds.

    A state is a question, or a conversation before one of its turns; the model takes one turn from there.
    """

    sampling_config: list[SamplingName] = Field(
        default=["high_temp"],
        min_length=1,
        title="Sampling configurations",
        description="Sampling configurations to run, each on every state.",
    )
    samples: int = Field(default=8, ge=1, description="Queries for each state under each sampling configuration.")
    states: Literal["questions", "trajectories", "both"] = Field(
        default="questions",
        description="Where the model takes its turn. 'questions': at the question, as its first. 'trajectories': where a conversation that was collected went on. 'both': at each.",
    )
    found: bool = Field(
        default=False,
        title="Found already",
        description="Also go on from conversations whose searches have found the page already.",
    )
    max_states: int | None = Field(
        default=None, ge=1, description="Conversations of a question to go on from at most; all when empty."
    )


class Nights(Settings):
    """A range of nights, both ends included."""

    since: date | None = Field(default=None, description="First night, as a date; from the first when empty.")
    until: date | None = Field(default=None, description="Last night, as a date; to the last when empty.")

    @model_validator(mode="after")
    def _is_a_range(self) -> "Nights":
        if self.since and self.until and self.since > self.until:
            raise ValueError("since is later than until")
        return self


class Process(Settings):
    """Trajectories → scored rollouts and preference pairs."""

    reward: RewardName = Field(
        default="linear",
        description="What a search scores that found the page: from 1 down to 1/k, by equal steps a rank (linear); one over its rank (reciprocal); or by the ranks of all pages that hold the answer (ndcg).",
    )
    min_rank_score: Share = Field(default=0.0, description="Keep rollouts whose best search scores at least this.")
    include_failed: bool = Field(default=False, description="Keep rollouts that never found the page.")
    max_pairs: int = Field(
        default=8,
        ge=0,
        description="Preference pairs that a question may give, and each conversation that queries were mined in.",
    )


def _all_formats(names: Any) -> Any:
    """The word "all" stands for every format, as in the reference pipeline."""
    return list(get_args(FormatName)) if names in ("all", ["all"]) else names


class Format(Settings):
    """Scored rollouts → training sets."""

    formats: Annotated[list[FormatName], BeforeValidator(_all_formats)] = Field(
        default=["sft_best"], min_length=1, description="Training sets to make; 'all' is every one."
    )
    split: Split = Field(
        default="train",
        description="Learn from the rollouts of these questions alone. What is learned from cannot be measured on.",
    )
    best_per_question: int | None = Field(
        default=None,
        ge=1,
        description="sft_best: keep so many best distinct queries a question, and a conversation that queries were mined in; all when empty.",
    )
    train_ratio: Share = Field(
        default=0.9, description="Share of questions in the training part; the rest measures the loss."
    )
    jsonl: bool = Field(default=False, title="JSONL", description="Also write the reference pipeline's JSONL files.")
