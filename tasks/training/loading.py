"""Load a model for training or merging: a folder or a model hub's name. Code of its own runs where it is trusted."""

import importlib.util
import os
from pathlib import Path
from typing import Any

from tasks.errors import TrainingError

# On a CPU, attention written out as matrix products is two to four times as fast as the fused kernel for rows up to about
# this long; beyond, its memory grows with the square of the length.
_SHORT = 512


def base_name(model: str) -> str:
    """How to name a base model in what is made from it: never by a local path, which would differ between machines."""
    return Path(model).name if Path(model).is_dir() else model


def load_tokenizer(model: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The model's tokenizer.

    Raises:
        TrainingError: it has no chat template, no end-of-turn token, or cannot say which characters a token stands for.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    if not tokenizer.chat_template:
        raise TrainingError(f"{model} has no chat template: take an instruction-tuned model")
    if not tokenizer.eos_token or not tokenizer.is_fast:
        raise TrainingError(f"{model} needs a fast tokenizer with an end-of-turn token: take another model")
    return tokenizer


def load_model(
    model: str | Path,
    *,
    bf16: bool,
    longest_row: int | None = None,
    quantize: str = "none",
    trust_remote_code: bool = False,
) -> Any:
    """The model with its language modelling head, on the CPU. One that sees images too is loaded whole, and reads text.

    Args:
        bf16: hold its weights in bfloat16 rather than float32.
        longest_row: tokens of the longest row that it will be given, where known.
        quantize: "none"; or "4bit", on this process's GPU then, if there is one, the head and the embeddings left as they are.

    Raises:
        TrainingError: it is no causal language model, or four bits are wanted where there is no bitsandbytes.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.utils import logging

    logging.disable_progress_bar()  # what loads in a second needs no bar, and there is one of ours around it
    short = longest_row is not None and longest_row <= _SHORT and not torch.cuda.is_available()
    config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    dtype = torch.bfloat16 if bf16 else torch.float32
    try:
        made = (AutoModelForImageTextToText if sees(config) else AutoModelForCausalLM).from_pretrained(
            model,
            dtype=dtype,
            attn_implementation="eager" if short else "sdpa",
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            **(_four_bits(dtype) if quantize == "4bit" else {}),
        )
    except ValueError as error:
        reason = str(error).strip().splitlines()[0]
        raise TrainingError(f"{model} cannot be trained as a causal language model: {reason}") from error
    for module in made.modules():
        # On a CPU, bitsandbytes lays weights out for inference at the first measurement, and from then on no gradient passes
        # through them.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return made


def load_classifier(model: Path, *, bf16: bool, trust_remote_code: bool = False) -> Any:
    """The model in its form for sequence classification, with one label, on the CPU; its head is still to be loaded.

    Args:
        bf16: hold its weights in bfloat16 rather than float32.

    Raises:
        TrainingError: transformers has no such form of it.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    try:
        made = AutoModelForSequenceClassification.from_pretrained(
            model,
            num_labels=1,
            dtype=torch.bfloat16 if bf16 else torch.float32,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
        )
    except ValueError as error:
        raise TrainingError(
            f"transformers has no form for sequence classification of {model}: use the reward model unmerged, or train one "
            "on a text model"
        ) from error
    # how it finds the last token of a text among several
    made.config.pad_token_id = load_tokenizer(model, trust_remote_code=trust_remote_code).pad_token_id
    return made


def packs(model: str | Path, longest: int, *, trust_remote_code: bool = False) -> bool:
    """Whether examples of up to `longest` tokens may share a row, each computed as if it were alone.

    A mask of ours keeps them apart, for which a layer with a sliding window forgets its window, and which a layer that carries a
    state or convolves never looks at.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code).get_text_config()
    others = ("layers_block_type", "block_types", "attention_types", "hybrid_override_pattern")
    if not getattr(config, "layer_types", None) and (
        config.model_type == "rwkv" or any(hasattr(config, o) for o in others)
    ):
        return False
    window = getattr(config, "sliding_window", None)
    layers = set(getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"])
    if layers == {"full_attention"}:
        return True
    return layers <= {"full_attention", "sliding_attention"} and window is not None and longest <= window


def meta_model(model: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The model's modules with their shapes, and no weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    kind = AutoModelForImageTextToText if sees(config) else AutoModelForCausalLM
    with torch.device("meta"):
        return kind.from_config(config, trust_remote_code=trust_remote_code)


def sees(config: Any) -> bool:
    """Whether a model of that configuration is shown images."""
    return getattr(config, "vision_config", None) is not None


def _four_bits(dtype: Any) -> dict[str, Any]:
    """How weights are loaded in four bits, the way QLoRA does: normal floats, their scales quantized too.

    Args:
        dtype: what products are computed in.

    Raises:
        TrainingError: bitsandbytes is not installed.
    """
    import torch

    if importlib.util.find_spec("bitsandbytes") is None:
        raise TrainingError(
            "four-bit weights need bitsandbytes: pip install 'drag[train,qlora]', or take --quantize none"
        )
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    device = int(os.environ.get("LOCAL_RANK", "0")) if torch.cuda.is_available() else "cpu"
    return {"quantization_config": quantization, "device_map": {"": device}}
