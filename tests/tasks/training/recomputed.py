"""Gradient checkpointing must change what a training needs, and nothing of what it learns."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch.utils.checkpoint

from tasks.training.spec import Spec
from tasks.training.train import train


def assert_recompute_changes_nothing(spec: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train with and without: layers are checkpointed where asked alone, and losses and adapters are the same to 1e-5."""
    from safetensors.numpy import load_file
    from transformers import modeling_utils

    calls = []
    checkpoint = torch.utils.checkpoint.checkpoint

    def counted(*arguments: Any, **named: Any) -> Any:
        calls.append(arguments)
        return checkpoint(*arguments, **named)

    monkeypatch.setattr(modeling_utils, "checkpoint", counted)
    found = {}
    for recompute in ("off", "auto", "on"):
        folder = spec.work_dir / recompute
        folder.mkdir()
        settings = spec.settings.model_copy(update={"recompute": recompute, "lr": 1e-2})
        train(replace(spec, settings=settings, work_dir=folder))
        history = json.loads((folder / "history.json").read_text())["history"]
        losses = [entry["loss"] for entry in history if "loss" in entry]
        found[recompute] = losses, load_file(folder / "adapter" / "adapter_model.safetensors"), len(calls)
    (kept, before, none), (_, _, small), (again, after, some) = (found[name] for name in ("off", "auto", "on"))
    assert none == small == 0 < some
    assert again == pytest.approx(kept, abs=1e-5)
    assert before.keys() == after.keys()
    assert max(abs(before[name] - after[name]).max() for name in before) < 1e-5
