"""Nothing that a model brings along is run: not its code, unless its user named it, and no pickle at all."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tasks import config, serve
from tasks.errors import ConfigError
from tasks.model import fetch_model, model_fingerprint
from tasks.network import free_port
from tasks.training.loading import load_model, load_tokenizer
from tests.tiny_model import tiny_model

# A network of one's own, as models on the hub bring it: importing it leaves a mark.
CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({mark!r}).touch()
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def with_code(tmp_path: Path) -> Path:
    folder = tiny_model(tmp_path / "model")
    (folder / "own.py").write_text(CODE.format(mark=str(tmp_path / "mark")))
    kept = json.loads((folder / "config.json").read_text())
    kept |= {"model_type": "own", "architectures": ["OwnModel"]}
    kept["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


def test_a_models_code_is_refused_unless_the_model_is_named(with_code: Path, tmp_path: Path) -> None:
    for trusted in ([], ["another/model"]):
        with pytest.raises(ConfigError, match=r"brings code of its own.*trusted_remote_code"):
            fetch_model(str(with_code), trusted)
    assert fetch_model(str(with_code), [str(with_code)]) == with_code
    with pytest.raises(Exception, match="trust_remote_code"):
        load_model(with_code, bf16=False)
    assert not (tmp_path / "mark").exists()


def test_the_code_of_a_model_that_is_named_runs(
    with_code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    load = f"load_model({str(with_code)!r}, bf16=False, trust_remote_code=True)"
    program = f"from tasks.training.loading import load_model; print(type({load}).__name__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["OwnModel"], done.stderr
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize("file", ["tokenizer_config.json", "preprocessor_config.json", "processor_config.json"])
def test_the_code_of_a_tokenizer_or_a_processor_is_code_too(tmp_path: Path, file: str) -> None:
    folder = tiny_model(tmp_path / "model")
    path = folder / file
    kept = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(kept | {"auto_map": {"AutoTokenizer": ["own.Own", None]}}))
    with pytest.raises(ConfigError, match="brings code of its own"):
        fetch_model(str(folder))


def test_a_damaged_description_of_a_model_is_named(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model")
    (folder / "config.json").write_text('{"architectures": [')
    with pytest.raises(ConfigError, match=r"config\.json is damaged"):
        fetch_model(str(folder))


def test_a_server_is_not_started_on_a_model_with_code(
    with_code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "vllm_python", lambda: sys.executable)
    with (
        pytest.raises(ConfigError, match="brings code"),
        serve.serving(str(with_code), config.Serve(), tmp_path / "work", free_port()),
    ):
        pass
    args = serve.command(with_code, 8000, config.Serve(), trust_remote_code=True)
    assert "--trust-remote-code" in args


def test_weights_that_are_pickles_are_never_read(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()

    class Mark:
        def __reduce__(self) -> tuple[object, tuple[str, str]]:
            return open, (str(tmp_path / "mark"), "w")

    torch.save(Mark(), folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="no weights in safetensors"):
        fetch_model(str(folder))
    with pytest.raises(Exception, match="safetensors"):
        load_model(folder, bf16=False)
    assert load_tokenizer(folder).chat_template
    assert not (tmp_path / "mark").exists()


def test_a_fingerprint_is_of_every_byte_of_the_weights_and_of_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRAG_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    weights, code = folder / "model.safetensors", folder / "own.py"
    found = []
    for middle, source in ((b"0", "a = 1"), (b"1", "a = 1"), (b"1", "a = 2")):
        weights.write_bytes(b"\0" * (2 << 20) + middle + b"\0" * (2 << 20))
        code.write_text(source)
        found.append(model_fingerprint(folder))
        assert model_fingerprint(folder) == found[-1]
    assert len(set(found)) == 3


def test_weights_are_hashed_once_on_a_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRAG_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    before = model_fingerprint(folder)
    (kept,) = (tmp_path / "cache" / "hashes").iterdir()
    kept.write_text(kept.read_text().replace(json.loads(kept.read_text())["sha256"], "what was kept"))
    assert model_fingerprint(folder) != before  # taken as it was kept
    os.utime(folder / "model.safetensors", ns=(0, 0))
    assert model_fingerprint(folder) == before  # and not for a file that was touched


def test_a_full_disk_below_the_cache_costs_only_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRAG_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # no file takes a byte, as on a full disk
    try:
        found = model_fingerprint(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert found == model_fingerprint(folder)


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("DRAG_CACHE", str(tmp_path / "cache"))
    folder = tiny_model(tmp_path / "model")
    assert model_fingerprint(folder) == model_fingerprint(folder)
