"""The named ways to draw tokens.

Each is said whole. What is not said, vLLM and transformers take from the model's generation_config.json, which may cut at the
20 likeliest tokens or punish words of the question: one name would stand for another way with each model.
"""

import hashlib
import json
from dataclasses import asdict, dataclass

from tasks import config


@dataclass(frozen=True, slots=True)
class ResolvedSampling:
    """A named sampling configuration with all overrides applied: what the server is told."""

    name: config.SamplingName
    temperature: float
    top_p: float
    repetition_penalty: float  # 1 is none
    max_tokens: int


_NAMED: dict[config.SamplingName, tuple[float, float, float]] = {
    "greedy": (0.0, 1.0, 1.0),
    "low_temp": (0.3, 0.9, 1.0),
    "default": (0.7, 0.95, 1.0),
    "high_temp": (1.0, 0.95, 1.0),
    "creative": (1.2, 0.95, 1.0),
    "diverse": (0.9, 0.98, 1.1),
}


def resolve(name: config.SamplingName, overrides: config.Sampling) -> ResolvedSampling:
    """A named configuration, with what `overrides` sets in place of its own values."""
    temperature, top_p, penalty = _NAMED[name]
    return ResolvedSampling(
        name=name,
        temperature=temperature if overrides.temperature is None else overrides.temperature,
        top_p=top_p if overrides.top_p is None else overrides.top_p,
        repetition_penalty=penalty if overrides.repetition_penalty is None else overrides.repetition_penalty,
        max_tokens=overrides.max_tokens,
    )


def sampling_fingerprint(sampling: ResolvedSampling) -> str:
    """Hash of the values that decide how tokens are drawn; the name is not one of them."""
    values = {name: value for name, value in asdict(sampling).items() if name != "name"}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
