"""LoRA adapts every linear module of the chosen parts, and nothing else, in each series of models that see."""

from itertools import chain, combinations
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from tasks.training.parts import lora_modules, part_of

TEXT = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 4, 4]},
}
SIGHT = {"depth": 3, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
IDS = {f"{kind}_token_id": number for number, kind in enumerate(("image", "video", "vision_start", "vision_end"), 8)}
SERIES: dict[str, Any] = {
    "Qwen2-VL": lambda: Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(
            text_config=TEXT,
            vision_config={"depth": 3, "embed_dim": 64, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 1},
            **IDS,
        )
    ),
    "Qwen2.5-VL": lambda: Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=TEXT, vision_config=SIGHT, **IDS)
    ),
    "Qwen3-VL": lambda: Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(
            text_config=TEXT | {"head_dim": 32}, vision_config=SIGHT | {"deepstack_visual_indexes": [0, 2]}, **IDS
        )
    ),
}
PARTS = ("language", "merger", "vision")


@pytest.mark.parametrize("parts", list(chain.from_iterable(combinations(PARTS, n) for n in (1, 2, 3))))
@pytest.mark.parametrize("series", SERIES)
def test_all_linear_modules_of_the_chosen_parts_and_no_other(series: str, parts: tuple[Any, ...]) -> None:
    model = SERIES[series]()
    wanted = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head" and part_of(name) in parts
    }
    adapted = get_peft_model(model, LoraConfig(r=2, **lora_modules(model, parts)))
    assert {part_of(name) for name in wanted} == set(parts)
    assert set(adapted.base_model.targeted_module_names) == wanted
