"""What the flows take: the stages' settings, composed."""

from typing import Literal

from pydantic import Field, model_validator

from tasks.config.base import Settings
from tasks.config.documents import Index, Ingest, Search
from tasks.config.evaluation import VARIANTS, Evaluate, Variants
from tasks.config.rollouts import Collect, Format, Process
from tasks.config.serving import Agent, Sampling, SamplingName, Serve, Server
from tasks.config.training import Finetune


class Run(Settings):
    """Base of what the flows take."""

    storage: str = Field(default="drag-data", description="Where artifacts lie: a local folder, or s3://bucket/prefix.")


class IngestRun(Run):
    """Parameters of the flow `ingest`."""

    ingest: Ingest = Field(description="Input.")
    index: Index = Field(default=Index(), description="Index.")


class ModelRun(Run):
    """What every flow that asks a model takes."""

    search: Search = Field(default=Search(), description="Search.")
    agent: Agent = Field(default=Agent(), description="Agent.")
    sampling: Sampling = Field(default=Sampling(), description="Overrides of the named sampling configurations.")
    server: Server = Field(default=Server(), description="Model and server.")
    serve: Serve = Field(default=Serve(), description="vLLM.")


class BaseRun(Run):
    """What every flow that handles a model's weights takes."""

    model: str = Field(default=Server().model, description="Base model: a model hub name or a local folder.")


class CollectRun(ModelRun):
    """Parameters of the flow `collect`."""

    collect: Collect = Field(default=Collect(), description="Collection.")
    adapter: bool = Field(default=False, description="Collect with the newest adapter instead of the base model.")


class ProcessRun(Run):
    """Parameters of the flow `process`."""

    process: Process = Field(default=Process(), description="Scoring and pairs.")


class FormatRun(Run):
    """Parameters of the flow `format`."""

    agent: Agent = Field(
        default=Agent(), description="The agent as it will be served; its prompt goes into the training sets."
    )
    format: Format = Field(default=Format(), description="Training sets.")


class PrepareRun(ProcessRun, FormatRun):
    """Parameters of the flow `prepare`: process, then format."""


class FinetuneRun(BaseRun):
    """Parameters of the flow `finetune`."""

    training_set: Literal["sft_best", "sft_trajectory", "sft_context"] = Field(
        default="sft_best", description="Training set to learn from."
    )
    finetune: Finetune = Field(default=Finetune(), description="Training.")


class MergeRun(BaseRun):
    """Parameters of the flow `merge`."""


class ServeRun(BaseRun):
    """Parameters of the flow `serve`."""

    adapter: bool = Field(default=False, description="Serve the newest adapter beside the base model.")
    serve: Serve = Field(default=Serve(), description="vLLM.")


class InferRun(ModelRun):
    """Parameters of the command `infer`."""

    question: str | None = Field(default=None, description="Question to ask; asks for questions when empty.")
    adapter: bool = Field(default=False, description="Ask the newest adapter instead of the base model.")
    sampling_config: SamplingName = Field(default="greedy", description="Sampling configuration.")


class EvaluateRun(ModelRun):
    """Parameters of the flow `evaluate`."""

    evaluate: Evaluate = Field(default=Evaluate(), description="Measurement.")
    variants: Variants = Field(default=list(VARIANTS), description="Runs to measure.")


class CompareRun(Run):
    """Parameters of the flow `compare`."""

    compare: list[str] = Field(
        default=[v.name for v in VARIANTS],
        min_length=2,
        description="Names of runs that were evaluated; each is compared with those before it.",
    )
    resamples: int = Field(default=10_000, ge=100, description="Bootstrap resamples behind an interval.")


class Improve(ModelRun):
    """Parameters of the flow `improve`: the whole loop, once round."""

    ingest: Ingest = Field(description="Input.")
    index: Index = Field(default=Index(), description="Index.")
    collect: Collect = Field(default=Collect(), description="Collection.")
    collect_agent: Agent | None = Field(
        default=None,
        description="Agent for collection where it is to differ; when empty, the same with worked examples in its prompt.",
    )
    process: Process = Field(default=Process(), description="Scoring and pairs.")
    format: Format = Field(default=Format(), description="Training sets; the first named one is learned from.")
    finetune: Finetune = Field(default=Finetune(), description="Training.")
    evaluate: Evaluate = Field(default=Evaluate(), description="Measurement.")
    variants: Variants = Field(
        default=list(VARIANTS), description="Runs to compare; each is compared with those before it."
    )

    @model_validator(mode="after")
    def _fits_together(self) -> "Improve":
        """What would else be found out only after hours of collection."""
        if not any(name.startswith("sft_") for name in self.format.formats):
            raise ValueError("formats names no sft_… training set, and that is what is learned from")
        if self.serve.adapters == "lora" and self.finetune.lora_r > self.serve.max_lora_rank:
            raise ValueError("lora_r is above max_lora_rank: the server would refuse the adapter")
        if any(variant.model == "adapter" and variant.examples != self.agent.examples for variant in self.variants):
            raise ValueError(
                "an adapter is served with the prompt it is trained on: its variant's examples are the agent's"
            )
        return self
