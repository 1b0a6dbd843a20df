"""Merge a LoRA adapter into its base model, which any server then serves without knowing of LoRA."""

import tempfile
from collections.abc import Collection
from pathlib import Path

from tasks.artifact import Artifact, fetch_folder, provenance, read_provenance, write_folder
from tasks.errors import ConfigError
from tasks.model import fetch_model, model_fingerprint
from tasks.training.loading import base_name, load_model, load_tokenizer


def merge(adapter: Artifact, model: str, uri: str, trusted: Collection[str] = ()) -> Artifact:
    """Write base + adapter as one checkpoint (model/1), with the tokenizer, in the base's own precision.

    Args:
        adapter: adapter/1.
        model: local folder or model hub name of its base.
        uri: folder to write to.
        trusted: names of models whose own code may run.

    Raises:
        ConfigError: the adapter was trained on another base, or is no safetensors file; or `fetch_model` refuses the base.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoConfig

    base, trust = fetch_model(model, trusted), model in trusted
    trained_on = read_provenance(adapter)["base_fingerprint"]
    if trained_on != model_fingerprint(base):
        raise ConfigError(f"adapter {adapter.uri} was trained on another model than {model}: merge it into that one")
    tensors = fetch_folder(adapter)
    if not (tensors / "adapter_model.safetensors").is_file():
        raise ConfigError(
            f"adapter {adapter.uri} has no adapter_model.safetensors, and nothing else is read: it could run code"
        )
    # Added up in float32 and rounded once: adding in bfloat16 would lose most of the adapter.
    whole = PeftModel.from_pretrained(load_model(base, bf16=False, trust_remote_code=trust), tensors)
    precision = AutoConfig.from_pretrained(base, trust_remote_code=trust).dtype or torch.float32
    merged = whole.merge_and_unload(safe_merge=True).to(precision)
    with tempfile.TemporaryDirectory() as scratch:
        merged.save_pretrained(scratch)
        load_tokenizer(base, trust_remote_code=trust).save_pretrained(scratch)
        facts = provenance({"adapter": adapter}, base_model=base_name(model), base_fingerprint=trained_on)
        return write_folder(Path(scratch), uri, "model/1", 1, facts)
