"""Results of stages, as Prefect stores and reads them: JSON of artifacts; nothing that is read runs."""

import base64
import json
import os
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from prefect.results import ResultRecord, ResultRecordMetadata, ResultStore
from prefect.serializers import JSONSerializer, PickleSerializer

from tasks import storage
from tasks.artifact import Artifact
from tasks.errors import ArtifactError, CollectError
from tasks.results import StageResults, checked

MADE = {"pages": Artifact("s3://bucket/pages.parquet", "0" * 64, 7, "pages/2")}


class Attack:
    """An object whose pickle makes a file when it is read."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


def stored(result: str, how: Any, **more: Any) -> bytes:
    return json.dumps({"metadata": {"serializer": how}, "result": result, **more}).encode()


def as_json(value: Any) -> str:
    return JSONSerializer().dumps(value).decode()


JSON = JSONSerializer().model_dump(mode="json")


@pytest.mark.parametrize("value", [MADE, CollectError("2 of 10 failed")], ids=["artifacts", "error"])
def test_what_a_stage_returns_is_read_again(storage_root: str, value: Any) -> None:
    results = StageResults(root=storage_root)
    metadata = ResultRecordMetadata(serializer=JSONSerializer(), storage_key="stage-key")
    results.write_path("stage-key", ResultRecord(metadata=metadata, result=value).serialize(), _sync=True)
    found = ResultStore(result_storage=results, serializer=JSONSerializer()).read("stage-key").result
    assert type(found) is type(value)
    assert str(found) == str(value)


def test_what_a_stage_returned_is_found_where_the_storage_lies_now(storage_root: str) -> None:
    def made(root: str) -> Any:
        return {"index": Artifact(storage.join(root, "index"), "1" * 64, 7, "index/1")} | MADE

    copy = storage_root + "-copy"
    metadata = ResultRecordMetadata(serializer=JSONSerializer(), storage_key="stage-key")
    record = ResultRecord(metadata=metadata, result=made(storage_root)).serialize()
    StageResults(root=storage_root).write_path("stage-key", record, _sync=True)
    lies = [storage.join(root, "results", "stage-key") for root in (storage_root, copy)]
    storage.write_bytes(lies[1], storage.read_bytes(lies[0]))
    for root in (storage_root, copy):
        store = ResultStore(result_storage=StageResults(root=root), serializer=JSONSerializer())
        assert store.read("stage-key").result == made(root)


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04no json",
        b"[]",
        stored(as_json(MADE), {**JSON, "type": "pickle"}),
        stored(as_json(MADE), {**JSON, "object_decoder": "os.system"}),
        stored(as_json(MADE), {**JSON, "jsonlib": "evil"}),
        stored(as_json(MADE), JSON, serializer={"type": "pickle"}),
        stored('{"pages": {"__class__": "pathlib.Path", "data": "/"}}', JSON),
        stored('[[{"__exc_type__": "builtins.SystemExit", "message": "0"}]]', JSON),
        stored(as_json(MADE), JSON).replace(b'"metadata"', b'"metadata": {"serializer": {"type": "pickle"}}, "meta"'),
    ],
)
def test_what_no_stage_writes_is_not_read(content: bytes) -> None:
    with pytest.raises(ArtifactError, match="not what a stage writes"):
        checked(content)


def test_of_two_values_for_one_name_none_slips_through() -> None:
    evil = '{"serializer": {"type": "pickle"}}'
    content = f'{{"metadata": {evil}, "metadata": {{"serializer": {json.dumps(JSON)}}}, "result": "1"}}'.encode()
    assert ResultRecord.deserialize(checked(content)).serializer == JSONSerializer()


def test_a_pickle_in_the_storage_is_not_run(storage_root: str, tmp_path: Path) -> None:
    trace = tmp_path / "it-ran"
    pickled = base64.encodebytes(cloudpickle.dumps(Attack(trace))).decode()
    metadata = ResultRecordMetadata(serializer=PickleSerializer(), storage_key="stage-key")
    record = ResultRecord(metadata=metadata, result=pickled).model_dump_json(serialize_as_any=True).encode()
    storage.write_bytes(storage.join(storage_root, "results", "stage-key"), record)
    store = ResultStore(result_storage=StageResults(root=storage_root), serializer=JSONSerializer())
    assert not store.exists("stage-key")  # so the stage is run, and its result written over this one
    with pytest.raises(ArtifactError):
        store.read("stage-key")
    assert not trace.exists()
    ResultRecord.deserialize(record)
    assert trace.exists(), "the attack works where nothing is checked"
