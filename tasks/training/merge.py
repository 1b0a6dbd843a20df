"""Merge a LoRA adapter into its base model, which any server then serves without knowing of LoRA."""

import tempfile
from pathlib import Path

from tasks.artifact import Artifact, fetch_folder, provenance, read_provenance, write_folder
from tasks.errors import ConfigError
from tasks.model import fetch_model, model_fingerprint
from tasks.training.loading import base_name, load_model, load_tokenizer


def merge(adapter: Artifact, model: str, uri: str) -> Artifact:
    """Write base + adapter as one checkpoint (model/1), with the tokenizer, in the base's own precision.

    Args:
        adapter: adapter/1.
        model: local folder or model hub name of its base.
        uri: folder to write to.

    Raises:
        ConfigError: the adapter was trained on another base.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoConfig

    base = fetch_model(model)
    trained_on = read_provenance(adapter)["base_fingerprint"]
    if trained_on != model_fingerprint(base):
        raise ConfigError(f"adapter {adapter.uri} was trained on another model than {model}: merge it into that one")
    # Added up in float32 and rounded once: adding in bfloat16 would lose most of the adapter.
    whole = PeftModel.from_pretrained(load_model(base, bf16=False), fetch_folder(adapter))
    merged = whole.merge_and_unload(safe_merge=True).to(AutoConfig.from_pretrained(base).dtype or torch.float32)
    with tempfile.TemporaryDirectory() as scratch:
        merged.save_pretrained(scratch)
        load_tokenizer(base).save_pretrained(scratch)
        facts = provenance({"adapter": adapter}, base_model=base_name(model), base_fingerprint=trained_on)
        return write_folder(Path(scratch), uri, "model/1", 1, facts)
