"""Settings of training."""

from typing import Literal

from pydantic import Field

from tasks.config.base import Settings, Share


class Finetune(Settings):
    """Training set → LoRA adapter."""

    epochs: float = Field(default=2.0, gt=0, description="Passes over the training set.")
    batch_size: int = Field(default=8, ge=1, description="Examples a device takes at once.")
    gradient_accumulation: int = Field(default=1, ge=1, description="Batches that make one optimizer step.")
    lr: float = Field(default=1e-3, gt=0, title="Learning rate", description="Peak learning rate.")
    lora_r: int = Field(default=16, ge=1, title="LoRA rank", description="LoRA rank.")
    lora_alpha: int = Field(default=32, ge=1, title="LoRA alpha", description="LoRA scale times rank.")
    lora_dropout: Share = Field(default=0.0, title="LoRA dropout", description="Dropout on the LoRA branch.")
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
    bf16: bool = Field(default=True, title="bfloat16", description="bfloat16 autocast.")
    seed: int = Field(default=0, description="Seed of weights and order.")
