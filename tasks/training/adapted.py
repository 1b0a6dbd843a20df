"""A base model with an adapter on it, as transformers runs it."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from tasks.artifact import Artifact, fetch_folder, read_provenance
from tasks.errors import ConfigError
from tasks.model import fetch_model, model_fingerprint
from tasks.training.loading import load_classifier, load_model


def base_of(adapter: Artifact, model: str, trusted: Collection[str] = ()) -> Path:
    """Folder of the base model that an adapter was trained on.

    Args:
        adapter: adapter/1 or reward-model/1.
        model: local folder or model hub name of its base.
        trusted: names of models whose own code may run.

    Raises:
        ConfigError: the adapter was trained on another base, or is no safetensors file; or `fetch_model` refuses the base.
    """
    base = fetch_model(model, trusted)
    if read_provenance(adapter)["base_fingerprint"] != model_fingerprint(base):
        raise ConfigError(f"adapter {adapter.uri} was trained on another model than {model}: use it with that one")
    if not (fetch_folder(adapter) / "adapter_model.safetensors").is_file():
        raise ConfigError(
            f"adapter {adapter.uri} has no adapter_model.safetensors, and nothing else is read: it could run code"
        )
    return base


def load_adapted(adapter: Artifact, model: str, trusted: Collection[str] = (), *, bf16: bool) -> Any:
    """PEFT's model of base and adapter, on the CPU; of a reward model, in its form for sequence classification.

    Args:
        adapter: adapter/1 or reward-model/1.
        model: local folder or model hub name of its base.
        trusted: names of models whose own code may run.

    Raises:
        ConfigError: as `base_of`.
        TrainingError: transformers has no form for sequence classification of a reward model's base.
    """
    from peft import PeftModel

    base = base_of(adapter, model, trusted)
    load: Callable[..., Any] = load_classifier if adapter.schema == "reward-model/1" else load_model
    return PeftModel.from_pretrained(load(base, bf16=bf16, trust_remote_code=model in trusted), fetch_folder(adapter))
