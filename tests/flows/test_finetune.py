"""finetune as a flow: what the training processes print is in the run's log, each line with its rank."""

from pathlib import Path

from prefect import get_client
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
from prefect.logging.handlers import APILogHandler

from flows.finetune import finetune
from tasks import artifact, config
from tasks.artifact import provenance, read_provenance, table_of, write_table
from tests.tasks.training.training_rows import rows
from tests.tiny_model import tiny_model


def test_what_each_process_prints_is_in_the_log(tmp_path: Path) -> None:
    root = str(tmp_path / "store")
    training_set = write_table(table_of(rows(42), "sft/2"), f"{root}/sft.parquet", "sft/2", provenance())
    artifact.save_ref(root, "sft_best", training_set)
    settings = config.FinetuneRun(
        storage=root,
        model=str(tiny_model(tmp_path / "model")),
        finetune=config.Finetune(epochs=1, batch_size=6),
        launch=config.Launch(processes_per_node=2),
    )
    run = finetune(settings, return_state=True).state_details.flow_run_id
    assert read_provenance(artifact.load_ref(root, "adapter"))["world_size"] == 2
    APILogHandler().flush()
    wanted = {"[rank 0] process 1 of 2 on cpu:0", "[rank 1] process 2 of 2 on cpu:0"}
    with get_client(sync_client=True) as client:
        logs = client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run])))
    assert wanted <= {log.message for log in logs}
