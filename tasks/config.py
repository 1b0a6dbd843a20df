"""Every setting of every stage: typed, described, validated once.

These models are the flows' parameters (the Prefect UI renders them as forms), the recipes in deployments/recipes are YAML
of the same models, and the command line takes the same names. Secrets are not settings: keys come from the environment.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

SamplingName = Literal["greedy", "low_temp", "default", "high_temp", "creative", "diverse"]
FormatName = Literal["sft_best", "sft_trajectory", "sft_context", "dpo", "reward"]
Split = Literal["train", "dev", "test", "all"]
Share = Annotated[float, Field(ge=0, le=1)]


class Settings(BaseModel):
    """Base of all settings: unknown names are refused, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Ingest(Settings):
    """PDFs or OCR JSONL, and questions → pages, questions with splits, and what was set aside."""

    documents: str = Field(
        description="Folder or s3:// prefix of PDFs, or an OCR JSONL file of {file, page_number, total_pages, text}."
    )
    questions: str | None = Field(
        default=None,
        description="Questions with known pages: a .jsonl or .parquet file, or hf:NAME[:SPLIT] for a Hugging Face data set.",
    )
    train_ratio: Share = Field(default=0.6, description="Share of document groups whose questions are for training.")
    dev_ratio: Share = Field(
        default=0.1, description="Share of document groups for choosing settings; what is left is for testing."
    )
    split_salt: str = Field(
        default="drag", description="Changes which documents fall into which split. Keep it to keep the split."
    )
    include_json: str | None = Field(
        default=None, description="JSON list of document names or question ids: only these questions are kept."
    )
    exclude_json: str | None = Field(
        default=None, description="JSON list of document names or question ids: these questions are dropped."
    )
    workers: int | None = Field(default=None, ge=1, description="Processes that read PDFs; one per core when empty.")

    @model_validator(mode="after")
    def _ratios(self) -> "Ingest":
        if self.train_ratio + self.dev_ratio > 1:
            raise ValueError("train_ratio and dev_ratio add up to more than 1")
        return self


class Index(Settings):
    """How pages are indexed."""

    engine: Literal["tantivy", "whoosh"] = Field(
        default="tantivy", description="tantivy is fast; whoosh is the reference. Both match the same pages."
    )


class Search(Settings):
    """How a query is read and answered."""

    operator: Literal["or", "and"] = Field(
        default="or",
        description="What joins words that no operator joins: ranked OR, or AND as the reference pipeline.",
    )
    expand: Literal["none", "question"] = Field(
        default="none", description="'question' adds the question's words to a query that has no operators."
    )
    file_boost: float = Field(
        default=3.0, ge=0, description="Weight of a match in the file name's words; 0 leaves them out."
    )
    title_boost: float = Field(
        default=3.0, ge=0, description="Weight of a match in the PDF title's words; 0 leaves them out."
    )


class Agent(Settings):
    """How the model is driven. What it is trained on and what it is served come from the same settings."""

    protocol: Literal["tags", "tools"] = Field(
        default="tools", description="'tools': OpenAI tool calls. 'tags': <think>, <search> and <answer> in plain text."
    )
    observation: Literal["none", "text"] = Field(
        default="text", description="What the model sees of a page that was found: its text, or only its name."
    )
    max_page_chars: int = Field(default=2000, ge=50, description="Characters of a page's text that the model sees.")
    max_iterations: int = Field(default=5, ge=1, description="Turns at most; the last one must answer.")
    answer: bool = Field(
        default=True, description="The last turn must answer. Off, the agent only searches, for as many turns."
    )
    top_k: int = Field(default=3, ge=1, description="Pages that a search returns; the reward counts ranks up to it.")
    examples: bool = Field(
        default=False, description="Put worked examples into the prompt. An untrained small model needs them."
    )


class Sampling(Settings):
    """How tokens are drawn, overriding the named configuration where set."""

    temperature: float | None = Field(default=None, ge=0, description="Overrides the configuration's temperature.")
    top_p: float | None = Field(default=None, gt=0, le=1, description="Overrides the named configuration's top-p.")
    repetition_penalty: float | None = Field(
        default=None, gt=0, description="Overrides the named configuration's repetition penalty."
    )
    max_tokens: int = Field(default=1024, ge=1, description="Tokens that one turn may generate.")


class Server(Settings):
    """The OpenAI-compatible server that is asked. Its key comes from the environment variable OPENAI_API_KEY."""

    base_url: str | None = Field(
        default=None, description="Address of a running server, such as http://host:8000/v1; empty starts vLLM here."
    )
    model: str = Field(
        default="HuggingFaceTB/SmolLM2-135M-Instruct",
        description="Model to ask: a model hub name, a local folder, or a served adapter's name.",
    )
    concurrency: int = Field(default=8, ge=1, description="Rollouts in flight at once.")
    request_timeout: float = Field(default=120, gt=0, description="Seconds one request may take.")
    rollout_timeout: float = Field(default=600, gt=0, description="Seconds one rollout may take.")
    max_retries: int = Field(default=4, ge=0, description="Further tries of a request whose failure can pass.")


class Serve(Settings):
    """The vLLM process that DRAG starts when no base_url is given."""

    max_model_len: int | None = Field(default=None, ge=256, description="Context length; the model's own when empty.")
    max_lora_rank: int = Field(default=16, ge=1, description="Largest LoRA rank that adapters may have.")
    max_num_seqs: int = Field(default=64, ge=1, description="Sequences that are generated at once.")
    gpu_memory_utilization: Share = Field(default=0.9, description="Share of the GPU's memory that vLLM takes.")
    tensor_parallel_size: int = Field(default=1, ge=1, description="GPUs that one model is spread over.")
    tool_call_parser: str | None = Field(
        default=None, description="vLLM's tool parser for the tools protocol, such as hermes."
    )
    reasoning_parser: str | None = Field(default=None, description="vLLM's reasoning parser, such as qwen3.")
    adapters: Literal["lora", "merged"] = Field(
        default="lora",
        description="How an adapter is served: loaded beside its base, or merged into it in a server of its own, which is several times faster on a CPU.",
    )
    start_timeout: float = Field(default=600, gt=0, description="Seconds until the server must answer.")


class Collect(Settings):
    """Questions × sampling configurations × samples → trajectories."""

    split: Split = Field(default="train", description="Which questions.")
    limit: int | None = Field(
        default=None, ge=1, description="Take only the first so many questions, in an order fixed by hash."
    )
    sampling_config: list[SamplingName] = Field(
        default=["default"], min_length=1, description="Sampling configurations to run, each on every question."
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
    jsonl: bool = Field(default=False, description="Also write the reference pipeline's JSONL files.")


class Finetune(Settings):
    """Training set → LoRA adapter."""

    epochs: float = Field(default=2.0, gt=0, description="Passes over the training set.")
    batch_size: int = Field(default=8, ge=1, description="Examples a device takes at once.")
    gradient_accumulation: int = Field(default=1, ge=1, description="Batches that make one optimizer step.")
    lr: float = Field(default=1e-3, gt=0, description="Peak learning rate.")
    lora_r: int = Field(default=16, ge=1, description="LoRA rank.")
    lora_alpha: int = Field(default=32, ge=1, description="LoRA scale times rank.")
    lora_dropout: Share = Field(default=0.0, description="Dropout on the LoRA branch.")
    mask_strategy: Literal["none", "assistant", "search-think", "search-only"] = Field(
        default="search-only",
        description="Which tokens are learned: all, what the assistant wrote, reasoning and query, or the query alone.",
    )
    weight_scheme: Literal["none", "rank-score", "rank-sq", "inv-effort", "binary"] = Field(
        default="none",
        description="How much an example counts: all alike, by its rank score, its square, one over effort spent, or hit at rank 1 only.",
    )
    batching: Literal["length-grouped", "packing"] = Field(
        default="packing",
        description="How examples share a batch without padding: by like length, or packed, a shared beginning computed once.",
    )
    max_length: int = Field(
        default=2048, ge=16, description="Examples with more tokens are set aside and counted, never cut."
    )
    save_steps: int = Field(
        default=25, ge=1, description="Optimizer steps between checkpoints; a kill loses at most these."
    )
    bf16: bool = Field(default=True, description="bfloat16 autocast.")
    seed: int = Field(default=0, description="Seed of weights and order.")


class Evaluate(Settings):
    """What runs are measured on, and with which searches."""

    split: Split = Field(default="test", description="Which questions.")
    limit: int | None = Field(
        default=None, ge=1, description="Take only the first so many questions, in an order fixed by hash."
    )
    rescore: list[Search] = Field(
        default=[],
        description="Further search settings under which each run's first query is ranked again, at no model cost.",
    )
    depth: int = Field(default=10, ge=10, description="Depth to which first searches are ranked, for Hit@k and MRR.")
    resamples: int = Field(default=10_000, ge=100, description="Bootstrap resamples behind an interval.")
    allow_failed_share: Share = Field(default=0.0, description="Share of rollouts that may fail, counting as misses.")


class Variant(Settings):
    """One run of the comparison."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9 -]*$", description="Its name in tables.")
    model: Literal["question", "base", "adapter"] = Field(
        description="'question' searches the raw question, without a model."
    )
    examples: bool = Field(default=False, description="Worked examples in the prompt.")


VARIANTS = (
    Variant(name="question", model="question"),
    Variant(name="base", model="base", examples=True),
    Variant(name="adapter", model="adapter"),
)


def _distinct(variants: list[Variant]) -> list[Variant]:
    if len({variant.name for variant in variants}) < max(2, len(variants)):
        raise ValueError("two or more runs with different names are needed to compare")
    return variants


Variants = Annotated[list[Variant], AfterValidator(_distinct)]


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
