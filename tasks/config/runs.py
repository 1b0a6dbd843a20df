"""What the flows take: the stages' settings, composed."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from tasks.config.adapters import NEWEST, AdapterName, AskedAdapter, refuse_reserved
from tasks.config.base import Settings, as_form, listed
from tasks.config.documents import Index, Ingest, Search
from tasks.config.evaluation import VARIANTS, Evaluate, Variants
from tasks.config.rollouts import Collect, Format, FormatName, Mine, Nights, Process, Source
from tasks.config.serving import Agent, Sampling, SamplingName, Serve, Server
from tasks.config.training import Finetune, Launch, SftName

# What people change first comes first in a form.
_ORDER = "storage what source target layout nights model training_set name from_adapter adapter ingest collect mine server agent collect_agent process format finetune launch evaluate variants"

_WHICH = "'newest', or the name that it was kept under"


def _as_form(schema: dict[str, Any]) -> None:
    first = _ORDER.split()
    fields = schema.get("properties", {})
    schema["properties"] = dict(
        sorted(fields.items(), key=lambda f: first.index(f[0]) if f[0] in first else len(first))
    )
    as_form(schema)


class Run(Settings):
    """Base of what the flows take."""

    model_config = ConfigDict(json_schema_extra=_as_form)

    storage: str = Field(default="drag-data", description="Where artifacts lie: a local folder, or s3://bucket/prefix.")


class IngestRun(Run):
    """Parameters of the flow `ingest`."""

    ingest: Ingest = Field(title="Documents and questions", description="What is read, and how questions are split.")
    index: Index = Field(default=Index(), title="Index", description="How pages are indexed.")


class ModelRun(Run):
    """What every flow that asks a model takes."""

    search: Search = Field(default=Search(), title="Search", description="How queries are read and answered.")
    agent: Agent = Field(default=Agent(), title="Agent", description="How the model is driven.")
    sampling: Sampling = Field(
        default=Sampling(),
        title="Sampling",
        description="How tokens are drawn; what is empty is as the named configuration says.",
    )
    server: Server = Field(default=Server(), title="Model and server", description="Who is asked.")
    serve: Serve = Field(default=Serve(), title="vLLM", description="How vLLM is started, where no base URL is given.")

    @property
    def asking(self) -> dict[str, Any]:
        """What it says of asking a model, by name: what another flow takes that asks the same one."""
        return {name: getattr(self, name) for name in ModelRun.model_fields}

    @property
    def starts_vllm(self) -> bool:
        """Whether a vLLM of our own is asked."""
        return not self.server.base_url

    @property
    def agents(self) -> list[Agent]:
        """Every agent that asks the model."""
        return [self.agent]

    @model_validator(mode="after")
    def _can_guide(self) -> "ModelRun":
        if any(agent.guided for agent in self.agents) and not self.server.extensions:
            raise ValueError("guided decoding is asked for in fields of vLLM: set extensions, or do without guided")
        return self

    @model_validator(mode="after")
    def _calls_are_read(self) -> "ModelRun":
        """vLLM refuses requests with tools while nothing is to read the model's calls."""
        calls = any(agent.protocol == "tools" for agent in self.agents)
        if calls and self.starts_vllm and self.serve.tool_call_parser is None:
            raise ValueError(
                "protocol tools: say by tool_call_parser how vLLM is to read the model's calls (hermes for Qwen), name a "
                "server by base_url, or take protocol tags"
            )
        return self

    @model_validator(mode="after")
    def _images_are_taken(self) -> "ModelRun":
        if any(agent.sees_images for agent in self.agents) and self.starts_vllm and self.serve.images_per_prompt == 0:
            raise ValueError("images_per_prompt is 0, so that vLLM takes no image, and the observation shows some")
        return self


class BaseRun(Run):
    """What every flow that handles a model's weights takes."""

    model: str = Field(default=Server().model, description="Base model: a model hub name or a local folder.")
    trusted_remote_code: list[str] = Field(
        default=[],
        title="Models whose code may run",
        description="Names of models that bring Python code of their own and may run it, with your rights; all others are refused.",
    )


class CollectRun(ModelRun):
    """Parameters of the flow `collect`."""

    collect: Collect = Field(default=Collect(), title="Collection", description="Which rollouts are run.")
    adapter: AskedAdapter = Field(
        default="", description=f"Collect with this adapter instead of the base model: {_WHICH}."
    )


class ReparseRun(Run):
    """Parameters of the flow `reparse`."""

    source: Source = Field(
        default="trajectories", description="What is read: collected trajectories, mined queries, or both."
    )
    nights: Nights = Field(
        default=Nights(), title="Nights", description="Nights whose are read; without a date, the newest collection."
    )


class MineRun(ModelRun):
    """Parameters of the flow `mine`.

    Of the agent count prompt, protocol and what a search returns: it takes one turn, in which it searches.
    """

    mine: Mine = Field(default=Mine(), title="Mining", description="Which queries are sampled.")
    nights: Nights = Field(
        default=Nights(),
        title="Nights",
        description="Whose trajectories are gone on from, where any are; without a date, the newest.",
    )
    adapter: AskedAdapter = Field(
        default="", description=f"Mine with this adapter instead of the base model: {_WHICH}."
    )


class ProcessRun(Run):
    """Parameters of the flow `process`."""

    source: Source = Field(
        default="trajectories", description="What is scored: collected trajectories, mined queries, or both together."
    )
    process: Process = Field(
        default=Process(), title="Scoring and pairs", description="Which rollouts are kept, and compared."
    )
    nights: Nights = Field(
        default=Nights(), title="Nights", description="Nights that are taken; without a date, the newest collection."
    )


class FormatRun(Run):
    """Parameters of the flow `format`."""

    agent: Agent = Field(
        default=Agent(), description="The agent as it will be served; its prompt goes into the training sets."
    )
    format: Format = Field(
        default=Format(), title="Training sets", description="What is made of the rollouts that are kept."
    )


class PrepareRun(ProcessRun, FormatRun):
    """Parameters of the flow `prepare`: process, then format."""


class FinetuneRun(BaseRun):
    """Parameters of the flow `finetune`."""

    training_set: SftName = Field(
        default="sft_best", description="sft: which of its training sets is learned from; dpo and reward have one each."
    )
    name: AdapterName = Field(
        default="",
        description="Name that the adapter is kept under beside being the newest, so that several can be compared; the method's (sft, dpo) when empty.",
    )
    from_adapter: AdapterName = Field(
        default="",
        title="Start from the adapter",
        description=f"Go on from this adapter, whose LoRA shape is kept: {_WHICH}; dpo then compares with it. From the base model when empty.",
    )
    finetune: Finetune = Field(default=Finetune(), title="Training", description="How the adapter is trained.")
    launch: Launch = Field(
        default=Launch(), title="Training processes", description="How many train together, and where they meet."
    )

    @property
    def learned_from(self) -> FormatName:
        """The training set that is learned from."""
        return self.training_set if self.finetune.method == "sft" else self.finetune.method

    @model_validator(mode="after")
    def _fits_together(self) -> "FinetuneRun":
        refuse_reserved(self.name)
        if self.finetune.method == "reward" and self.from_adapter:
            raise ValueError("a reward model starts from the base model: leave from_adapter empty")
        if self.finetune.method == "reward" and self.name:
            raise ValueError("a reward model is kept under no name, only as the newest: leave name empty")
        return self


class MergeRun(BaseRun):
    """Parameters of the flow `merge`."""

    source: Literal["adapter", "reward_model"] = Field(
        default="adapter", title="What is merged", description="An adapter, or the newest reward model."
    )
    adapter: AdapterName = Field(default=NEWEST, min_length=1, description=f"Which adapter: {_WHICH}.")

    @model_validator(mode="after")
    def _only_adapters_have_names(self) -> "MergeRun":
        if self.source == "reward_model" and self.adapter != NEWEST:
            raise ValueError("a reward model is kept under no name: leave adapter out")
        return self


class ServeRun(BaseRun):
    """Parameters of the flow `serve`."""

    adapter: AskedAdapter = Field(default="", description=f"Serve this adapter beside the base model: {_WHICH}.")
    serve: Serve = Field(default=Serve(), title="vLLM", description="How vLLM is started, where no base URL is given.")


class InferRun(ModelRun):
    """Parameters of the command `infer`."""

    question: Annotated[list[str], BeforeValidator(listed)] = Field(
        default=[], title="Questions", description="Questions to ask; asks for questions when empty."
    )
    adapter: AskedAdapter = Field(default="", description=f"Ask this adapter instead of the base model: {_WHICH}.")
    in_process: bool = Field(
        default=False,
        description="Run the model in this process by transformers, which needs the training packages but no vLLM and no server.",
    )
    sampling_config: SamplingName = Field(default="greedy", description="Sampling configuration.")

    @property
    def starts_vllm(self) -> bool:
        return super().starts_vllm and not self.in_process

    @model_validator(mode="after")
    def _asks_one_model(self) -> "InferRun":
        if self.in_process and self.server.base_url:
            raise ValueError("in_process runs the model here: leave base_url out, or ask that server")
        return self


class ExportRun(Run):
    """Parameters of the flow `export`."""

    what: Literal[
        "pages", "trajectories", "mined", "processed", "training-sets", "results", "adapter", "reward-model"
    ] = Field(
        title="What is exported",
        description="The newest of it: 'processed' with its pairs and statistics, 'training-sets' all that there are, 'results' those of the runs that were last compared, with the comparison.",
    )
    adapter: AdapterName = Field(
        default=NEWEST, min_length=1, description=f"Which adapter, where one is exported: {_WHICH}."
    )
    target: str = Field(title="Where to", description="Folder or s3:// prefix that it is written to.")
    layout: Literal["jsonl", "hf"] = Field(
        default="jsonl",
        description="'jsonl': the reference pipeline's files. 'hf': a Hugging Face data set, Parquet with a card. An adapter or reward model is in PEFT's layout either way.",
    )

    @model_validator(mode="after")
    def _only_adapters_have_names(self) -> "ExportRun":
        if self.what != "adapter" and self.adapter != NEWEST:
            raise ValueError(f"{self.what} have no names: leave adapter out")
        return self


class ImportRun(BaseRun):
    """Parameters of the flow `import`."""

    what: Literal[
        "trajectories", "mined", "processed", "sft_best", "sft_trajectory", "sft_context", "dpo", "reward", "adapter"
    ] = Field(title="What is imported", description="It becomes the newest of its kind, which later stages take.")
    name: AdapterName = Field(
        default="", description="Name that an adapter is kept under beside being the newest; none when empty."
    )
    source: Annotated[list[str], BeforeValidator(listed)] = Field(
        min_length=1,
        max_length=2,
        title="Files",
        description="A .jsonl or .parquet file, the folder of a data set that was exported, or an adapter's folder. A second file is the training set's part for measuring the loss, or the pairs of scored rollouts.",
    )
    agent: Agent = Field(
        default=Agent(),
        title="Agent",
        description="The agent whose conversations rollouts and examples of others become, as it will be served.",
    )

    @model_validator(mode="after")
    def _only_adapters_have_names(self) -> "ImportRun":
        refuse_reserved(self.name)
        if self.name and self.what != "adapter":
            raise ValueError("only an adapter is kept under a name: leave name empty")
        return self

    @model_validator(mode="after")
    def _no_file_is_passed_over(self) -> "ImportRun":
        if len(self.source) > 1 and self.what in ("trajectories", "mined", "adapter"):
            raise ValueError(
                f"{self.what} are read from one file or folder: leave {self.source[1]} out, or join the files"
            )
        return self


class EvaluateRun(ModelRun):
    """Parameters of the flow `evaluate`."""

    evaluate: Evaluate = Field(default=Evaluate(), title="Measurement", description="What runs are measured on.")
    variants: Variants = Field(default=list(VARIANTS), description="Runs to measure.")
    verbose: bool = Field(
        default=False, description="Show every question's turns when its run is done: queries, results, ranks, answer."
    )


class CompareRun(Run):
    """Parameters of the flow `compare`."""

    compare: list[str] = Field(
        default=[v.name for v in VARIANTS],
        min_length=2,
        description="Names of runs that were evaluated; each is compared with those before it.",
    )
    resamples: int = Field(default=10_000, ge=100, description="Bootstrap resamples behind an interval.")
