"""A base model with an adapter on it, as transformers runs it."""

from collections.abc import Collection
from typing import Any

from tasks.artifact import Artifact, fetch_folder, read_provenance
from tasks.errors import ConfigError
from tasks.model import fetch_model, model_fingerprint
from tasks.training.loading import load_model


def load_adapted(adapter: Artifact, model: str, trusted: Collection[str] = (), *, bf16: bool) -> Any:
    """PEFT's model of base and adapter, on the CPU.

    Args:
        adapter: adapter/1.
        model: local folder or model hub name of its base.
        trusted: names of models whose own code may run.

    Raises:
        ConfigError: the adapter was trained on another base, or is no safetensors file; or `fetch_model` refuses the base.
    """
    from peft import PeftModel

    base = fetch_model(model, trusted)
    if read_provenance(adapter)["base_fingerprint"] != model_fingerprint(base):
        raise ConfigError(f"adapter {adapter.uri} was trained on another model than {model}: use it with that one")
    tensors = fetch_folder(adapter)
    if not (tensors / "adapter_model.safetensors").is_file():
        raise ConfigError(
            f"adapter {adapter.uri} has no adapter_model.safetensors, and nothing else is read: it could run code"
        )
    return PeftModel.from_pretrained(load_model(base, bf16=bf16, trust_remote_code=model in trusted), tensors)
