"""A merged model computes what base and adapter compute together."""

import json
from pathlib import Path

import pytest

from tasks.artifact import Artifact, fetch_folder, write_folder
from tasks.errors import ConfigError
from tasks.model import model_fingerprint
from tasks.training.loading import load_model, load_tokenizer
from tasks.training.merge import merge
from tests.tiny_model import tiny_model
from tests.tiny_vlm import tiny_vlm


@pytest.fixture
def adapter(model: Path, tmp_path: Path) -> Artifact:
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(load_model(model, bf16=False), config).save_pretrained(tmp_path / "adapter")
    facts = {"base_fingerprint": model_fingerprint(model)}
    return write_folder(tmp_path / "adapter", str(tmp_path / "stored"), "adapter/1", 1, facts)


def test_logits_are_those_of_base_and_adapter(model: Path, adapter: Artifact, storage_root: str) -> None:
    import torch
    from peft import PeftModel

    merged = fetch_folder(merge(adapter, str(model), storage_root + "/merged"))
    ids = torch.arange(40)[None]
    with torch.no_grad():
        both = PeftModel.from_pretrained(load_model(model, bf16=False), fetch_folder(adapter))(ids).logits
        alone = load_model(merged, bf16=False)(ids).logits
        base = load_model(model, bf16=False)(ids).logits
    assert (both - alone).abs().max() < 1e-4 < 0.01 < (both - base).abs().max()
    assert load_tokenizer(merged).chat_template == load_tokenizer(model).chat_template


def test_another_base_is_refused(adapter: Artifact, tmp_path: Path) -> None:
    other = tiny_model(tmp_path / "other", seed=7)
    with pytest.raises(ConfigError, match="another model"):
        merge(adapter, str(other), str(tmp_path / "merged"))


@pytest.mark.parametrize("seeing", [False, True])
def test_it_is_written_in_the_bases_precision(seeing: bool, tmp_path: Path) -> None:
    """Also of a base that says it of its text alone, as the Qwen3-VL checkpoints do."""
    import torch
    from peft import LoraConfig, get_peft_model

    base = (tiny_vlm if seeing else tiny_model)(tmp_path / "base")
    network = load_model(base, bf16=False).to(torch.bfloat16)
    network.save_pretrained(base)
    told = json.loads((base / "config.json").read_text())
    if seeing:
        told["text_config"]["dtype"] = told.pop("dtype")
        (base / "config.json").write_text(json.dumps(told))
    learned = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(network, learned).save_pretrained(tmp_path / "adapter")
    facts = {"base_fingerprint": model_fingerprint(base)}
    adapter = write_folder(tmp_path / "adapter", str(tmp_path / "stored"), "adapter/1", 1, facts)
    merged = fetch_folder(merge(adapter, str(base), str(tmp_path / "merged")))
    kinds = {
        entry["dtype"]
        for file in merged.glob("*.safetensors")
        for name, entry in safetensors_header(file).items()
        if name != "__metadata__"
    }
    assert kinds == {"BF16"}


def safetensors_header(file: Path) -> dict[str, dict[str, str]]:
    """The names and kinds of a file's tensors: https://github.com/huggingface/safetensors#format."""
    data = file.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
