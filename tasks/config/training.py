"""Settings of training: what is learned, and by how many processes."""

from typing import Literal, get_args

from pydantic import Field, model_validator

from tasks.config.base import Settings, Share
from tasks.config.rollouts import FormatName

Method = Literal["sft", "dpo", "reward"]
Part = Literal["language", "merger", "vision"]
SftName = Literal["sft_best", "sft_trajectory", "sft_context"]
LEARNS_FROM: dict[Method, tuple[FormatName, ...]] = {"sft": get_args(SftName), "dpo": ("dpo",), "reward": ("reward",)}
LORA_SHAPE = {"lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"}  # → as PEFT calls them


class Finetune(Settings):
    """Training set → LoRA adapter. A step learns from batch_size × gradient_accumulation examples of every process.

    An example of sft is a token sequence; one of dpo and reward is a prompt with all queries that are compared behind it.
    """

    method: Method = Field(
        default="sft",
        description="What is learned: the queries that worked (sft), better rather than worse ones (dpo), or to score them (reward).",
    )
    epochs: float = Field(default=2.0, gt=0, description="Passes over the training set.")
    batch_size: int = Field(
        default=8,
        ge=1,
        description="Examples a process takes at once; of dpo and reward, prompts with all that is compared behind them.",
    )
    gradient_accumulation: int = Field(
        default=1, ge=1, description="Batches of every process that make one optimizer step."
    )
    lr: float = Field(default=1e-3, gt=0, title="Learning rate", description="Peak learning rate.")
    lora_r: int = Field(default=16, ge=1, title="LoRA rank", description="LoRA rank.")
    lora_alpha: int = Field(default=32, ge=1, title="LoRA alpha", description="LoRA scale times rank.")
    lora_dropout: Share = Field(default=0.0, title="LoRA dropout", description="Dropout on the LoRA branch.")
    parts: list[Part] = Field(
        default=["language", "merger"],
        min_length=1,
        title="Parts that LoRA adapts",
        description="Of a model that sees: the language model, what brings images to it (merger), the tower that sees (vision). The latter two only where the training set shows images.",
    )
    merger_lr_factor: float = Field(
        default=1.0, gt=0, title="Merger's learning rate", description="Times the learning rate, for the merger."
    )
    vision_lr_factor: float = Field(
        default=0.1,
        gt=0,
        title="Vision tower's learning rate",
        description="Times the learning rate, for the vision tower.",
    )
    mask_strategy: Literal["none", "assistant", "search-think", "search-only"] = Field(
        default="search-only",
        description="sft, dpo: which tokens are learned: all, what the assistant wrote, reasoning and query, or the query alone.",
    )
    weight_scheme: Literal["none", "rank-score", "rank-sq", "inv-effort", "binary"] = Field(
        default="none",
        description="sft, dpo: how much an example, or the better one of a pair, counts: all alike, by its rank score, its square, one over effort spent, or hit at rank 1 only.",
    )
    beta: float = Field(
        default=0.1,
        gt=0,
        title="DPO's beta",
        description="dpo: what parting from the model that training starts from costs; a lower one lets it part further.",
    )
    margin_scale: float = Field(
        default=0.0,
        ge=0,
        description="dpo: the better query must win by so much times the difference of the two scores; 0 asks for no margin.",
    )
    reward_loss: Literal["regression", "pairs"] = Field(
        default="regression",
        description="reward: the score itself is learned (regression), or which of two queries of a question has the higher one (pairs).",
    )
    batching: Literal["length-grouped", "packing"] = Field(
        default="packing",
        description="How examples share a batch without padding: by like length, or packed, a shared beginning computed once. A model whose attention slides, or that has other layers than attention, takes them by like length.",
    )
    max_length: int = Field(
        default=2048, ge=16, description="Examples with more tokens are set aside and counted, never cut."
    )
    save_steps: int = Field(
        default=25, ge=1, description="Optimizer steps between checkpoints; a kill loses at most these."
    )
    bf16: bool = Field(default=True, title="bfloat16", description="bfloat16 autocast.")
    seed: int = Field(default=0, description="Seed of weights and order.")
    recompute: Literal["auto", "on", "off"] = Field(
        default="auto",
        title="Compute activations again",
        description="In the backward pass, rather than keep them (gradient checkpointing): less memory, slower steps. auto: from a billion parameters.",
    )
    strategy: Literal["ddp", "fsdp"] = Field(
        default="ddp",
        description="Several processes: each holds the model (ddp), or it is sharded over their GPUs (fsdp), for one that a GPU cannot hold.",
    )
    quantize: Literal["none", "4bit"] = Field(
        default="none",
        description="Hold the frozen weights in four bits (QLoRA): a quarter of the memory, slower steps. Needs bitsandbytes.",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> "Finetune":
        """What contradicts itself. Four-bit weights fit every GPU, so there is nothing to gain from sharding them."""
        if self.strategy == "fsdp" and self.quantize != "none":
            raise ValueError("strategy fsdp shards unquantized weights: take quantize none, or strategy ddp")
        if self.method == "reward" and self.weight_scheme != "none":
            raise ValueError("method reward learns from bad queries as from good ones: take weight_scheme none")
        return self


class Launch(Settings):
    """The processes that train together, started by torchrun where there are several."""

    processes_per_node: int | None = Field(
        default=None,
        ge=1,
        description="Training processes on a machine; empty is one for each of its GPUs, or one where there is none.",
    )
    nodes: int = Field(
        default=1,
        ge=1,
        title="Machines",
        description="Machines that train together. Each runs the same command, with storage on S3, and, in a deployment, takes a slot of the limit gpu-training.",
    )
    rendezvous: str | None = Field(
        default=None,
        pattern=r"^[^:/\s]+:\d+$",
        description="HOST:PORT on one of several machines; empty takes torchrun's variable PET_RDZV_ENDPOINT.",
    )
