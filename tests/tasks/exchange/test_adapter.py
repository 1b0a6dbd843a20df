"""Adapters from elsewhere: taken when they fit their base and refused when not; of what they bring, only what is known."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from tasks import storage
from tasks.artifact import fetch_folder, read_provenance
from tasks.errors import ConfigError, InputError
from tasks.exchange.adapter import export_adapter, import_adapter
from tasks.model import model_fingerprint
from tasks.training.lineage import trainings
from tests.tiny_model import tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def adapter(model: Path, tmp_path: Path) -> Path:
    """A folder that PEFT wrote, with more in it than an adapter."""
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(r=4, target_modules="all-linear"))
    tuned.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "training_args.bin").write_bytes(b"a pickle")
    change(tmp_path / "adapter", base_model_name_or_path="someone/tiny")
    return tmp_path / "adapter"


def change(folder: Path, **fields: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_an_adapter_is_taken_and_given_back(model: Path, adapter: Path, storage_root: str, tmp_path: Path) -> None:
    source = storage.join(storage_root, "theirs")
    storage.upload_folder(adapter, source)
    made = import_adapter(source, str(model), (), storage.join(storage_root, "ours"))
    known = read_provenance(made)
    assert known["base_fingerprint"] == model_fingerprint(model)
    assert known["base_said"] == "someone/tiny"
    assert known["prompt_fingerprints"] == []
    folder = fetch_folder(made)
    assert not (folder / "training_args.bin").exists()
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), folder)

    export_adapter(made, tmp_path / "out")
    provenance = json.loads((tmp_path / "out" / "provenance.json").read_text())
    provenance["prompt_fingerprints"] = ["abc"]
    (tmp_path / "out" / "provenance.json").write_text(json.dumps(provenance))
    again = import_adapter(str(tmp_path / "out"), str(model), (), storage.join(storage_root, "again"))
    assert read_provenance(again)["prompt_fingerprints"] == ["abc"]
    for name in ("adapter_model.safetensors", "adapter_config.json", "README.md"):
        assert (fetch_folder(again) / name).read_bytes() == (adapter / name).read_bytes()


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("[]", "should be an object"),
        ('{"settings": 3}', "(settings: "),
        ('{"prompt_fingerprints": "abc"}', "(prompt_fingerprints: "),
        ('{"started_from": {"steps": "many"}}', "(started_from.steps: "),
    ],
)
def test_what_no_export_wrote_is_refused_before_anything_rests_on_it(
    model: Path, adapter: Path, tmp_path: Path, said: str, told: str
) -> None:
    (adapter / "provenance.json").write_text(said)
    with pytest.raises(InputError) as refused:
        import_adapter(str(adapter), str(model), (), str(tmp_path / "made"))
    assert f"{adapter}/provenance.json: is not what an export writes (" in str(refused.value)
    assert told in str(refused.value)


def test_what_is_left_out_of_its_trainings_is_not_known(model: Path, adapter: Path, tmp_path: Path) -> None:
    said = '{"settings": {"method": "dpo"}, "steps": 3, "examples": null, "started_from": {"steps": 2}, "more": 1}'
    (adapter / "provenance.json").write_text(said)
    known = read_provenance(import_adapter(str(adapter), str(model), (), str(tmp_path / "made")))
    unknown = {"settings": None, "examples": None, "questions": None}
    assert trainings(known) == [unknown | {"steps": 2}, unknown | {"settings": {"method": "dpo"}, "steps": 3}]
    assert known["trained"]["more"] == 1


def test_what_does_not_fit_is_refused(model: Path, adapter: Path, tmp_path: Path) -> None:
    def refused(folder: Path, says: str, base: Path = model) -> None:
        with pytest.raises(ConfigError, match=says):
            import_adapter(str(folder), str(base), (), str(tmp_path / "made"))
        assert not (tmp_path / "made").exists()

    change(adapter, base_model_name_or_path="someone/larger")
    refused(adapter, "its base is someone/larger, not")
    change(adapter, base_model_name_or_path="/home/someone/checkpoint-7")  # a path says nothing here
    refused(adapter, r"as a matrix of \d+ × \d+.*of another model", tiny_model(tmp_path / "wide" / "tiny", hidden=192))
    refused(adapter, r"layers\.1\..*does not have", tiny_model(tmp_path / "shallow" / "tiny", layers=1))
    change(adapter, peft_type="IA3")
    refused(adapter, "none of LoRA")
    change(adapter, peft_type="LORA")
    (adapter / "provenance.json").write_text('{"base_model": "tiny", "base_fingerprint": "0"}')
    refused(adapter, "was trained on tiny of fingerprint 0")
    (adapter / "provenance.json").unlink()
    (adapter / "adapter_model.safetensors").unlink()
    refused(adapter, "no readable adapter_model.safetensors")
    shutil.rmtree(adapter)
    with pytest.raises(InputError, match=r"adapter_config\.json"):
        import_adapter(str(adapter), str(model), (), str(tmp_path / "made"))
