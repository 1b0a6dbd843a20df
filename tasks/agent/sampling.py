"""The named ways to draw tokens."""

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
    repetition_penalty: float | None  # None: not sent, as it is vLLM's own and other servers may refuse it
    max_tokens: int


_NAMED: dict[config.SamplingName, tuple[float, float, float | None]] = {
    "greedy": (0.0, 1.0, None),
    "low_temp": (0.3, 0.9, None),
    "default": (0.7, 0.95, None),
    "high_temp": (1.0, 0.95, None),
    "creative": (1.2, 0.95, None),
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
