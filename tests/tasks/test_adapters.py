"""Adapters as PEFT saves them: vLLM serves all of one, or the check says what it would refuse or leave out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tasks import config
from tasks.adapters import check_adapter
from tasks.errors import ConfigError
from tests.tiny_model import tiny_model

LINEARS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("base"))


class Seeing(torch.nn.Module):
    """A language model with a vision tower, its parts named as in Qwen-VL."""

    def __init__(self, language_model: torch.nn.Module, tower: str) -> None:
        super().__init__()
        self.language_model = language_model
        self.add_module(tower, torch.nn.ModuleDict({"attn": torch.nn.Linear(8, 8), "merger": torch.nn.Linear(8, 8)}))


def _saved(base: Path, to: Path, *, tower: str | None = None, **lora: Any) -> Path:
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    if tower:
        model = Seeing(model, tower)
    get_peft_model(model, LoraConfig(**{"r": 8, "target_modules": LINEARS} | lora)).save_pretrained(to)
    return to


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"r": 4, "rank_pattern": {"v_proj": 16}},
        {"use_rslora": True},
        {"tower": "visual", "target_modules": r".*language_model\..*_proj"},
    ],
    ids=str,
)
def test_linear_layers_of_the_language_model_are_served(base: Path, tmp_path: Path, lora: dict[str, Any]) -> None:
    check_adapter(_saved(base, tmp_path, **lora), base, config.Serve())


@pytest.mark.parametrize(
    ("lora", "says"),
    [
        ({"r": 32}, r"rank 32: set max_lora_rank"),
        ({"rank_pattern": {"v_proj": 64}}, r"rank 64: set max_lora_rank"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
        ({"target_modules": [*LINEARS, "embed_tokens"]}, r"model\.embed_tokens, which vLLM serves for few"),
        ({"target_modules": [*LINEARS, "lm_head"]}, r"lm_head, which vLLM serves for few"),
        ({"use_dora": True}, "use_dora=true"),
        ({"bias": "all"}, "bias=all"),
        ({"tower": "visual", "target_modules": [*LINEARS, "attn"]}, r"1 modules, such as visual\.attn\).*tower_lora"),
        ({"tower": "vision_tower", "target_modules": ["attn"]}, r"vision_tower\.attn"),
        ({"tower": "mm", "target_modules": ["merger"]}, r"mm\.merger"),
    ],
    ids=str,
)
def test_what_is_not_served_is_refused_and_the_message_says_what_to_do(
    base: Path, tmp_path: Path, lora: dict[str, Any], says: str
) -> None:
    folder = _saved(base, tmp_path, **lora)
    with pytest.raises(ConfigError, match=says) as caught:
        check_adapter(folder, base, config.Serve())
    assert "adapters=merged" in str(caught.value)


def test_a_tower_is_served_where_vllm_does_so_and_is_told_to(base: Path, tmp_path: Path) -> None:
    folder = _saved(base, tmp_path / "adapter", tower="visual", target_modules=["attn", "merger"])
    with pytest.raises(ConfigError, match="does not serve for models of type llama"):
        check_adapter(folder, base, config.Serve(tower_lora=True))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_vl"}))
    check_adapter(folder, tmp_path, config.Serve(tower_lora=True))


def test_an_adapter_that_is_a_pickle_is_not_read(base: Path, tmp_path: Path) -> None:
    folder = _saved(base, tmp_path)
    (folder / "adapter_model.safetensors").unlink()
    torch.save({}, folder / "adapter_model.bin")
    with pytest.raises(ConfigError, match=r"no readable adapter_model\.safetensors"):
        check_adapter(folder, base, config.Serve())
    (folder / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ConfigError, match=r"no readable adapter_model\.safetensors"):
        check_adapter(folder, base, config.Serve())


def test_what_is_no_lora_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no adapter in PEFT's layout"):
        check_adapter(tmp_path, tmp_path, config.Serve())
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(ConfigError, match="none of LoRA"):
        check_adapter(tmp_path, tmp_path, config.Serve())
