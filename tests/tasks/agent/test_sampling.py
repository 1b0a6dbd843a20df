"""The named configurations are those of the specification, and overrides win."""

from typing import get_args

import pytest

from tasks import config
from tasks.agent.sampling import resolve, sampling_fingerprint

NAMED = {
    "greedy": (0.0, 1.0, 1.0),
    "low_temp": (0.3, 0.9, 1.0),
    "default": (0.7, 0.95, 1.0),
    "high_temp": (1.0, 0.95, 1.0),
    "creative": (1.2, 0.95, 1.0),
    "diverse": (0.9, 0.98, 1.1),
}


@pytest.mark.parametrize("name", get_args(config.SamplingName))
def test_named(name: config.SamplingName) -> None:
    sampling = resolve(name, config.Sampling())
    assert (sampling.temperature, sampling.top_p, sampling.repetition_penalty) == NAMED[name]
    assert sampling.name == name


def test_overrides_win_even_when_zero() -> None:
    overrides = config.Sampling(temperature=0.0, top_p=0.5, repetition_penalty=1.3, max_tokens=7)
    sampling = resolve("creative", overrides)
    assert (sampling.temperature, sampling.top_p, sampling.repetition_penalty, sampling.max_tokens) == (0, 0.5, 1.3, 7)


def test_fingerprint_is_of_values_not_names() -> None:
    prints = {sampling_fingerprint(resolve(name, config.Sampling())) for name in get_args(config.SamplingName)}
    assert len(prints) == len(get_args(config.SamplingName))
    same = resolve("creative", config.Sampling(temperature=0.7))
    assert sampling_fingerprint(same) == sampling_fingerprint(resolve("default", config.Sampling()))
