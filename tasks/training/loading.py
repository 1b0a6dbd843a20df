"""Load a model for training or merging: a folder or a model hub's name, code of its own never run."""

from pathlib import Path
from typing import Any

from tasks.errors import TrainingError

# On a CPU, attention written out as matrix products is two to four times as fast as the fused kernel for rows up to about
# this long; beyond, its memory grows with the square of the length.
_SHORT = 512


def base_name(model: str) -> str:
    """How to name a base model in what is made from it: never by a local path, which would differ between machines."""
    return Path(model).name if Path(model).is_dir() else model


def load_tokenizer(model: str | Path) -> Any:
    """The model's tokenizer.

    Raises:
        TrainingError: it has no chat template, no end-of-turn token, or cannot say which characters a token stands for.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    if not tokenizer.chat_template:
        raise TrainingError(f"{model} has no chat template: take an instruction-tuned model")
    if not tokenizer.eos_token or not tokenizer.is_fast:
        raise TrainingError(f"{model} needs a fast tokenizer with an end-of-turn token: take another model")
    return tokenizer


def load_model(model: str | Path, *, bf16: bool, longest_row: int | None = None) -> Any:
    """The model with its language modelling head, on the CPU.

    Args:
        bf16: hold its weights in bfloat16 rather than float32.
        longest_row: tokens of the longest row that it will be given, where known.

    Raises:
        TrainingError: it is no causal language model of text.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # what loads in a second needs no bar, and there is one of ours around it
    short = longest_row is not None and longest_row <= _SHORT and not torch.cuda.is_available()
    try:
        return AutoModelForCausalLM.from_pretrained(
            model,
            dtype=torch.bfloat16 if bf16 else torch.float32,
            attn_implementation="eager" if short else "sdpa",
            trust_remote_code=False,
        )
    except ValueError as error:
        reason = str(error).strip().splitlines()[0]
        raise TrainingError(f"{model} cannot be trained as a causal language model: {reason}") from error
