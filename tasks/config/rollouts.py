"""Settings of rollouts: which are run, what is kept of them, which training sets they become."""

from typing import Literal

from pydantic import Field

from tasks.config.base import Settings, Share, Split
from tasks.config.serving import SamplingName

FormatName = Literal["sft_best", "sft_trajectory", "sft_context", "dpo", "reward"]


class Collect(Settings):
    """Questions × sampling configurations × samples → trajectories."""

    split: Split = Field(default="train", description="Which questions.")
    limit: int | None = Field(
        default=None, ge=1, description="Take only the first so many questions, in an order fixed by hash."
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
    flush_every: int = Field(
        default=16, ge=1, description="Finished rollouts after which a shard writes a part; a kill loses at most these."
    )
    resume: bool = Field(
        default=True, description="Go on from what an earlier run finished; otherwise collect all of it again."
    )
    allow_failed_share: Share = Field(default=0.0, description="Share of rollouts that may fail before the run does.")


class Process(Settings):
    """Trajectories → scored rollouts and preference pairs."""

    min_rank_score: Share = Field(default=0.0, description="Keep rollouts whose best search scores at least this.")
    include_failed: bool = Field(default=False, description="Keep rollouts that never found the page.")
    max_pairs: int = Field(default=8, ge=0, description="Preference pairs a question may give.")


class Format(Settings):
    """Scored rollouts → training sets."""

    formats: list[FormatName] = Field(default=["sft_best"], min_length=1, description="Training sets to make.")
    best_per_question: int | None = Field(
        default=None, ge=1, description="sft_best: keep so many best distinct queries a question; all when empty."
    )
    train_ratio: Share = Field(
        default=0.9, description="Share of questions in the training part; the rest measures the loss."
    )
    jsonl: bool = Field(default=False, title="JSONL", description="Also write the reference pipeline's JSONL files.")
