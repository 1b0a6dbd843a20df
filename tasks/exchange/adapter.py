"""A LoRA adapter from elsewhere, in PEFT's layout, checked against its base model and stored as ours."""

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pydantic import Field, TypeAdapter

from tasks import artifact, folders, storage
from tasks.adapters import adapted_modules, read_config
from tasks.artifact import Artifact
from tasks.errors import ConfigError, InputError
from tasks.exchange.exported import Open, checked
from tasks.model import fetch_model, model_fingerprint
from tasks.training.loading import base_name, meta_model

_FILES = ("adapter_config.json", "adapter_model.safetensors", "README.md")


class _Training(Open):
    """What tasks/training/lineage.py reads."""

    settings: dict[str, Any] | None = None
    examples: int | None = None
    questions: int | None = None
    steps: int | None = None
    started_from: "_Training | None" = None


class _Provenance(_Training):
    base_model: str | None = None
    base_fingerprint: str | None = None
    prompt_fingerprints: list[str] = Field(default=[])
    conversed_as: dict[str, Any] | None = None
    learned_from: dict[str, str] = Field(default={})


def import_adapter(source: str, model: str, trusted: Collection[str], uri: str) -> Artifact:
    """Copy an adapter's configuration, tensors and card to `uri`. Nothing else is taken: other files could hold code.

    Which prompt it was trained on, it says only if DRAG exported it; else nobody knows, and `prompt_fingerprints` is empty.

    Args:
        source: folder, or s3:// prefix.
        model: local folder or model hub name of its base.
        trusted: names of models whose own code may run.

    Raises:
        InputError: there is no such folder, or its provenance.json is not what an export writes.
        ConfigError: it is no LoRA adapter in safetensors, or was made for another base.
    """
    if not storage.exists(storage.join(source, _FILES[0])):
        raise InputError(f"there is no {_FILES[0]}; give the folder that PEFT's save_pretrained wrote", file=source)
    base = fetch_model(model, trusted)
    with folders.scratch("adapter") as folder:
        for name in (*_FILES, "provenance.json"):
            if storage.exists(file := storage.join(source, name)):
                (folder / name).write_bytes(storage.read_bytes(file))
        said = _refuse_other_base(folder, model, base, trust=model in trusted)
        known = _provenance(folder, source, model_fingerprint(base), model)
        facts = artifact.provenance(
            imported_sha256=storage.fingerprint(str(folder)),
            base_model=base_name(model),
            base_said=said,
            base_fingerprint=model_fingerprint(base),
            prompt_fingerprints=known.prompt_fingerprints,
            conversed_as=known.conversed_as,
            learned_from=known.learned_from,
            settings=known.settings or {},
            trained=known.model_dump(mode="json"),
        )
        return artifact.write_folder(folder, uri, "adapter/1", 1, facts)


def _provenance(folder: Path, source: str, fingerprint: str, model: str) -> _Provenance:
    """What DRAG wrote beside the adapter when it trained it; nothing when it did not."""
    file = folder / "provenance.json"
    if not file.exists():
        return _Provenance()
    known = checked(TypeAdapter(_Provenance), file.read_bytes(), storage.join(source, file.name))
    if known.base_fingerprint not in (None, fingerprint):
        raise ConfigError(
            f"the adapter was trained on {known.base_model} of fingerprint {known.base_fingerprint}, and {model} "
            f"has {fingerprint}: name the model that it was trained on by --model"
        )
    return known


def _refuse_other_base(folder: Path, model: str, base: Path, *, trust: bool) -> str | None:
    """Compare the base's name, and every adapted module's shape; returns the name that the adapter has for its base."""
    said = read_config(folder).get("base_model_name_or_path")
    last = str(said or "").rstrip("/").rsplit("/", 1)[-1].lower()
    if last and last not in (Path(model).name.lower(), base.name.lower()) and not _is_copy(said):
        raise ConfigError(
            f"the adapter says that its base is {said}, not {model}: name that by --model, or correct "
            "base_model_name_or_path in its adapter_config.json"
        )
    network = dict(meta_model(base, trust_remote_code=trust).named_modules())
    for name, (inner, outer) in adapted_modules(folder).items():
        weight = getattr(network.get(name), "weight", None)
        if weight is None:
            raise ConfigError(f"the adapter changes {name}, which {model} does not have: it is of another model")
        if tuple(weight.shape) != (outer, inner):
            raise ConfigError(
                f"the adapter changes {name} as a matrix of {outer} × {inner}, in {model} it has "
                f"{' × '.join(map(str, weight.shape))}: it is of another model"
            )
    return None if said is None else str(said)


def _is_copy(said: Any) -> bool:
    """Whether the base's name is a local path of whoever trained it, which says nothing here."""
    return Path(str(said)).is_absolute()


def export_adapter(adapter: Artifact, folder: Path) -> None:
    """Copy an adapter, or reward model, with its card and provenance, into a local folder."""
    shutil.copytree(artifact.fetch_folder(adapter), folder, dirs_exist_ok=True)
