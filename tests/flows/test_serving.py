"""Whom a flow asks: what cannot be served is said before anything is started."""

import importlib.util

import pytest

from flows.serving import model_server
from tasks import config
from tasks.errors import ConfigError


def test_adapters_are_merged_only_where_that_can_be_done(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The image of the serving pool has no PEFT: a run that would find out after its training is refused at its start."""
    merged = config.Serve(adapters="merged")
    with model_server(config.Server(), merged, str(tmp_path)):
        pass
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="take adapters lora"), model_server(config.Server(), merged, str(tmp_path)):
        pass
    with model_server(config.Server(), config.Serve(), str(tmp_path)):
        pass
