"""Settings of the model that is asked: the agent that drives it, how it samples, where it is served."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from tasks.config.base import Settings, Share, listed

SamplingName = Literal["greedy", "low_temp", "default", "high_temp", "creative", "diverse"]


_ADDRESS = r"^https?://[^@/?#\s]+(/[^@?#\s]*)?$"


def _address(address: str) -> str:
    """An address without its last slash, and without secrets: settings are stored and shown."""
    if not re.match(_ADDRESS, address):
        raise ValueError(
            "not an address such as http://host:8000/v1; a user, password or key does not belong in it: "
            "set the environment variable OPENAI_API_KEY"
        )
    return address.rstrip("/")


Address = Annotated[str, AfterValidator(_address), Field(json_schema_extra={"pattern": _ADDRESS})]


class Agent(Settings):
    """How the model is driven. What it is trained on and what it is served come from the same settings."""

    protocol: Literal["tags", "tools"] = Field(
        default="tags",
        description="'tags': `<think>`, `<search>` and `<answer>` in plain text, which any chat model can follow. 'tools': OpenAI tool calls.",
    )
    observation: Literal["none", "text", "image", "both"] = Field(
        default="text",
        description="What the model sees of a page that was found: its text, its image, both, or only its name. A page without a PDF is seen by its text.",
    )
    max_page_chars: int = Field(default=2000, ge=50, description="Characters of a page's text that the model sees.")
    image_dpi: int = Field(
        default=200,
        ge=10,
        le=1200,
        title="Image resolution",
        description="Dots an inch that pages are rendered with, as far as the pixels allow.",
    )
    image_min_pixels: int = Field(
        default=256 * 28 * 28, ge=1, description="Pixels that an image has at least; a smaller page is rendered larger."
    )
    image_max_pixels: int = Field(
        default=1280 * 28 * 28,
        ge=1,
        le=50_000_000,
        description="Pixels that an image has at most; a larger page is rendered smaller. A token is 28 × 28 pixels (Qwen2.5-VL) or 32 × 32 (Qwen3-VL).",
    )
    image_max_bytes: int = Field(
        default=3 * 1024 * 1024,
        ge=10_000,
        description="Bytes of an image at most; a third more as it is sent. One that is larger is rendered with less quality.",
    )
    max_iterations: int = Field(default=5, ge=1, description="Turns at most; the last one must answer.")
    answer: bool = Field(
        default=True, description="The last turn must answer. Off, the agent only searches, for as many turns."
    )
    top_k: int = Field(default=3, ge=1, description="Pages that a search returns; the reward counts ranks up to it.")
    examples: bool = Field(
        default=False, description="Put worked examples into the prompt. An untrained small model needs them."
    )
    guided: bool = Field(
        default=False,
        title="Guided decoding",
        description="Let vLLM hold every turn to a valid action, a search or an answer of the right form. For small models; one that reasons at length needs a reasoning parser.",
    )

    @model_validator(mode="after")
    def _has_a_size(self) -> "Agent":
        if self.image_min_pixels > self.image_max_pixels:
            raise ValueError("image_min_pixels is above image_max_pixels")
        return self

    @property
    def sees_images(self) -> bool:
        """Whether pages are shown as images."""
        return self.observation in ("image", "both")


class Sampling(Settings):
    """How tokens are drawn, overriding the named configuration where set."""

    temperature: float | None = Field(
        default=None, ge=0, description="Overrides the named configuration's temperature."
    )
    top_p: float | None = Field(
        default=None, gt=0, le=1, title="Top-p", description="Overrides the named configuration's top-p."
    )
    repetition_penalty: float | None = Field(
        default=None, gt=0, description="Overrides the named configuration's repetition penalty."
    )
    max_tokens: int = Field(default=1024, ge=1, description="Tokens that one turn may generate.")


class Server(Settings):
    """The OpenAI-compatible servers that are asked. Their key comes from the environment variable OPENAI_API_KEY."""

    base_url: Annotated[list[Address], BeforeValidator(listed)] = Field(
        default=[],
        title="Base URLs",
        description="Addresses of running servers, such as `http://host:8000/v1`, that share the work; empty starts vLLM here. Their key comes from the environment.",
    )
    model: str = Field(
        default="HuggingFaceTB/SmolLM2-135M-Instruct",
        description="Model to ask: a model hub name, a local folder, or a served adapter's name.",
    )
    trusted_remote_code: list[str] = Field(
        default=[],
        title="Models whose code may run",
        description="Names of models that bring Python code of their own and may run it, with your rights; all others are refused.",
    )
    concurrency: int = Field(default=8, ge=1, description="Rollouts in flight at once.")
    request_timeout: float = Field(default=120, gt=0, description="Seconds one request may take.")
    rollout_timeout: float = Field(
        default=600,
        gt=0,
        title="Time allowed a question",
        description="Seconds one rollout, all turns on one question, may take; then it is given up as failed.",
    )
    max_retries: int = Field(default=4, ge=0, description="Further tries of a request whose failure can pass.")
    context_length: int | None = Field(
        default=None,
        ge=256,
        title="Context of the model asked",
        description="Tokens that prompt and answer may have together: no longer request is sent. What the server says when empty; one that says nothing is asked.",
    )
    send_images: Literal["inline", "url"] = Field(
        default="inline",
        description="How a page's image reaches the server: within the request, or by an address that the server reads it from: a file below the storage folder, or a signed one of S3.",
    )
    image_token_side: int = Field(
        default=28,
        ge=1,
        title="Side of an image's token",
        description="Pixels: 28 for Qwen2.5-VL, 32 for Qwen3-VL. So many squares are counted as tokens when an image's place in the context is reckoned.",
    )
    extensions: bool = Field(
        default=True,
        title="Fields of vLLM",
        description="Send request fields that are vLLM's own: a forced answer has the right form, repetition is penalised, and what else decides how tokens are drawn is the sampling configuration's. Off for a server that refuses unknown fields.",
    )


class Serve(Settings):
    """The vLLM process that DRAG starts when no base_url is given."""

    max_model_len: int | None = Field(
        default=None, ge=256, title="Context length", description="Tokens; the model's own when empty."
    )
    max_lora_rank: int = Field(
        default=16, ge=1, le=512, title="Largest LoRA rank", description="Largest LoRA rank that adapters may have."
    )
    tower_lora: bool = Field(
        default=False,
        title="LoRA on the vision tower",
        description="Serve also what an adapter changes of the part that sees images; vLLM does so for the Qwen-VL series.",
    )
    max_num_seqs: int = Field(
        default=64, ge=1, title="Sequences at once", description="Sequences that are generated at once."
    )
    gpu_memory_utilization: Share = Field(
        default=0.9, title="Share of GPU memory", description="Share of the GPU's memory that vLLM takes."
    )
    tensor_parallel_size: int = Field(
        default=1, ge=1, title="GPUs a model", description="GPUs that one model is spread over."
    )
    data_parallel_size: int = Field(
        default=1,
        ge=1,
        title="Copies of the model",
        description="Copies that share the requests behind one address; each takes as many GPUs as one model is spread over.",
    )
    images_per_prompt: int | None = Field(
        default=None,
        ge=0,
        description="Images that a prompt may hold. With 0 a model that sees is given text alone, which leaves it more memory; vLLM's own limit when empty.",
    )
    tool_call_parser: str | None = Field(
        default=None, description="vLLM's tool parser for the tools protocol, such as hermes."
    )
    reasoning_parser: str | None = Field(default=None, description="vLLM's reasoning parser, such as qwen3.")
    adapters: Literal["lora", "merged"] = Field(
        default="lora",
        description="How an adapter is served: loaded beside its base, or merged into it in a server of its own, which is several times faster on a CPU.",
    )
    port: int | None = Field(default=None, ge=1, le=65535, description="Port on loopback; a free one when empty.")
    host: str = Field(
        default="127.0.0.1",
        pattern=r"^[A-Za-z0-9.:-]+$",
        description="Address that vLLM listens on. 0.0.0.0 lets other machines ask it; OPENAI_API_KEY must then be set.",
    )
    start_timeout: float = Field(default=600, gt=0, description="Seconds until the server must answer.")
    max_restarts: int = Field(
        default=3, ge=0, description="Times that a server which ended, hangs or has a dead engine is started again."
    )
