"""finetune as a flow: by each method, and what the training processes print is in the run's log, each line with its rank."""

import json
from pathlib import Path

import pytest
from prefect import get_client
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
from prefect.logging.handlers import APILogHandler

from flows.finetune import finetune, merge
from tasks import config, refs
from tasks.artifact import fetch_folder, provenance, read_provenance, table_of, write_folder, write_table
from tasks.model import model_fingerprint
from tasks.training.loading import load_model
from tests.tasks.training.training_rows import pair_rows, reward_rows, rows
from tests.tiny_model import tiny_model


def test_what_each_process_prints_is_in_the_log(tmp_path: Path) -> None:
    root = str(tmp_path / "store")
    training_set = write_table(table_of(rows(42), "sft/2"), f"{root}/sft.parquet", "sft/2", provenance())
    refs.save_ref(root, "sft_best", training_set)
    settings = config.FinetuneRun(
        storage=root,
        model=str(tiny_model(tmp_path / "model")),
        finetune=config.Finetune(epochs=1, batch_size=6),
        launch=config.Launch(processes_per_node=2),
    )
    run = finetune(settings, return_state=True).state_details.flow_run_id
    assert not list((Path(root) / "work" / "training").iterdir())
    assert read_provenance(refs.load_ref(root, "adapter"))["world_size"] == 2
    APILogHandler().flush()
    wanted = {"[rank 0] process 1 of 2 on cpu:0", "[rank 1] process 2 of 2 on cpu:0"}
    with get_client(sync_client=True) as client:
        logs = client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run])))
    assert wanted <= {log.message for log in logs}


def test_dpo_goes_on_from_what_sft_made_and_a_reward_model_takes_no_adapter_s_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import LoraConfig, get_peft_model

    root, model = str(tmp_path / "store"), str(tiny_model(tmp_path / "model"))
    for name, made, schema in (("dpo", pair_rows(12), "dpo/3"), ("reward", reward_rows(24), "reward/3")):
        uri = f"{root}/{name}.parquet"
        refs.save_ref(root, name, write_table(table_of(made, schema), uri, schema, provenance()))
    lora = LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(load_model(model, bf16=False), lora).save_pretrained(tmp_path / "saved")
    facts = {"base_fingerprint": model_fingerprint(Path(model)), "prompt_fingerprints": ["prompt"]}
    start = write_folder(tmp_path / "saved", f"{root}/start", "adapter/1", 1, facts)
    refs.save_ref(root, "adapter-sft", start)

    settings = config.FinetuneRun(
        storage=root,
        model=model,
        name="ranked",
        from_adapter="sft",
        finetune=config.Finetune(method="dpo", epochs=1, batch_size=4, lora_r=4, bf16=False),
    )
    (run,) = finetune(settings)
    adapter = refs.load_ref(root, "adapter")
    assert adapter == refs.load_ref(root, "adapter-ranked") == run.artifacts["adapter"]
    assert read_provenance(adapter)["inputs"]["start"] == start.sha256
    assert "Share of pairs held out that are told apart" in capsys.readouterr().err
    (again,) = finetune(settings)
    assert again.cached
    assert "Share of pairs held out that are told apart" in capsys.readouterr().err

    scoring = settings.finetune.model_copy(update={"method": "reward"})
    finetune(settings.model_copy(update={"name": "", "from_adapter": "", "finetune": scoring}))
    assert "Spearman's ρ within a question" in capsys.readouterr().err
    assert refs.load_ref(root, "adapter") == adapter
    assert refs.load_ref(root, "reward_model").schema == "reward-model/1"
    merge(config.MergeRun(storage=root, model=model, source="reward_model"))
    merged = fetch_folder(refs.load_ref(root, "merged_reward_model"))
    assert json.loads((merged / "config.json").read_text())["architectures"] == ["LlamaForSequenceClassification"]
    assert not refs.has_ref(root, "merged_model")
