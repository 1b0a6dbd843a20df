"""Whether vLLM serves all that an adapter learned: of what PEFT can train it refuses some, and leaves some out silently."""

import json
from pathlib import Path

from tasks import config
from tasks.errors import ConfigError
from tasks.training.parts import SEEING

_HEADS = {"embed_tokens", "lm_head"}
# of the models whose tower vLLM serves adapters for (supports_tower_connector_lora in 0.32), those that DRAG has recipes for
_TOWER_SERVED = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"}


def check_adapter(folder: Path, base: Path, settings: config.Serve) -> None:
    """Return if vLLM, started with these settings, serves every tensor of an adapter.

    Args:
        folder: the adapter, in PEFT's layout.
        base: folder of its base model.

    Raises:
        ConfigError: it would refuse the adapter or leave out a part of it; the message says what to do.
    """
    kept = read_config(folder)
    ranks = _ranks(folder)
    towers = sorted(name for name in ranks if not SEEING.isdisjoint(name.split(".")))
    heads = sorted(name for name in ranks if name.rsplit(".", 1)[-1] in _HEADS)
    rank = max(ranks.values(), default=0)
    where = f"the adapter in {folder}"
    merged = "or serve it merged into its base (adapters=merged)"
    if unserved := _unserved(kept):
        raise ConfigError(f"{where} has {', '.join(unserved)}, which vLLM does not serve: train it without, {merged}")
    if heads:
        raise ConfigError(
            f"{where} adapts {heads[0]}, which vLLM serves for few models: train linear layers alone, {merged}"
        )
    if rank > settings.max_lora_rank:
        raise ConfigError(f"{where} has rank {rank}: set max_lora_rank to at least that, {merged}")
    if towers and not settings.tower_lora:
        raise ConfigError(
            f"{where} adapts what sees images ({len(towers)} modules, such as {towers[0]}), which vLLM would leave out "
            f"silently: set tower_lora, train the language model alone, {merged}"
        )
    if towers and (kind := json.loads((base / "config.json").read_text()).get("model_type")) not in _TOWER_SERVED:
        raise ConfigError(
            f"{where} adapts what sees images ({towers[0]}), which vLLM does not serve for models of type {kind}: "
            f"train the language model alone, {merged}"
        )


def read_config(folder: Path) -> dict[str, object]:
    """PEFT's configuration of the LoRA adapter in a folder.

    Raises:
        ConfigError: there is none, or it is of another kind.
    """
    try:
        kept = json.loads((folder / "adapter_config.json").read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} holds no adapter in PEFT's layout: {error}") from error
    if not isinstance(kept, dict) or kept.get("peft_type") != "LORA":
        raise ConfigError(f"the adapter in {folder} is none of LoRA, and no other kind can be served")
    return kept


def adapted_modules(folder: Path) -> dict[str, tuple[int, int]]:
    """Width in and width out of each adapted module, by its name in the base model. Embeddings are left out.

    Raises:
        ConfigError: the tensors are not in a safetensors file. Another would be a pickle, which is never read.
    """
    shapes = _shapes(folder)
    return {
        module: (parts["A"][-1], parts["B"][0])
        for module, parts in shapes.items()
        if len(parts.get("A", ())) == len(parts.get("B", ())) == 2
    }


def _ranks(folder: Path) -> dict[str, int]:
    """Rank of each adapted module, by its name in the base model."""
    return {
        module: parts["A"][0] if "A" in parts else min(parts["embedding_A"])
        for module, parts in _shapes(folder).items()
        if "A" in parts or "embedding_A" in parts
    }


def _shapes(folder: Path) -> dict[str, dict[str, list[int]]]:
    """Shapes of an adapter's tensors: module → "A", "B", "embedding_A" or "embedding_B" → shape."""
    from safetensors import SafetensorError, safe_open

    file = folder / "adapter_model.safetensors"
    shapes: dict[str, dict[str, list[int]]] = {}
    try:
        with safe_open(file, framework="numpy") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - it is no mapping
                module, _, part = key.removeprefix("base_model.model.").partition(".lora_")
                shapes.setdefault(module, {})[part.partition(".")[0]] = tensors.get_slice(key).get_shape()
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{folder} holds no readable adapter_model.safetensors: {error}") from error
    return shapes


def _unserved(kept: dict[str, object]) -> list[str]:
    """What PEFT's configuration names that vLLM has no way to serve."""
    found = [f"modules_to_save={kept['modules_to_save']}"] if kept.get("modules_to_save") else []
    found += [f"{name}=true" for name in ("use_dora", "lora_bias", "use_qalora") if kept.get(name)]
    return found + ([f"bias={kept['bias']}"] if kept.get("bias", "none") != "none" else [])
