"""Large files go to S3 and come from it in parts; what goes wrong then is said as of small ones."""

import random
from collections import Counter
from pathlib import Path

import pytest

from tasks import storage
from tasks.errors import ConfigError, StorageError
from tests.flaky_s3 import flaky_s3


def test_files_of_several_parts_come_and_go_in_parts_and_appear_whole(
    storage_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_PART_BYTES", 5 * 2**20)  # the least that S3 allows
    data = random.Random(0).randbytes(11 * 2**20)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "model.safetensors").write_bytes(data)
    (tmp_path / "in" / "small.json").write_bytes(b"{}")
    uri, sent = storage.join(storage_root, "folder"), Counter[str]()
    early: list[bool] = []
    if is_s3 := storage.is_s3(uri):
        events = storage._client().meta.events
        events.register("before-call.s3", lambda model, **_: sent.update([model.name]), unique_id="sent")
        events.register("after-call.s3.UploadPart", lambda **_: early.append(storage.exists(uri)), unique_id="early")
    storage.upload_folder(tmp_path / "in", uri)
    storage.download_folder(uri, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == data
    assert storage.read_bytes(storage.join(uri, "model.safetensors")) == data
    if is_s3:
        events.unregister("before-call.s3", unique_id="sent")
        events.unregister("after-call.s3.UploadPart", unique_id="early")
        assert early == [False] * 3
        assert (sent["UploadPart"], sent["CompleteMultipartUpload"], sent["PutObject"]) == (3, 1, 1)


def test_a_folder_that_cannot_be_stored_or_fetched_says_so(
    s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_PART_BYTES", 5 * 2**20)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "file").write_bytes(bytes(6 * 2**20))
    with pytest.raises(ConfigError, match=r"no-such-bucket/x/file.*AWS_ENDPOINT_URL"):
        storage.upload_folder(tmp_path / "in", "s3://no-such-bucket/x")
    with pytest.raises(ConfigError, match=r"no-such-bucket/x.*AWS_ENDPOINT_URL"):
        storage.download_folder("s3://no-such-bucket/x", tmp_path / "out")


def test_a_part_that_breaks_off_is_read_again(
    s3_root: str, s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = random.Random(0).randbytes(3 * 2**20)
    storage.write_bytes(storage.join(s3_root, "folder/file"), data)
    with flaky_s3(s3_server) as flaky:
        monkeypatch.setenv("AWS_ENDPOINT_URL", flaky.url)
        storage._client.cache_clear()
        try:
            flaky.cut = 2
            storage.download_folder(storage.join(s3_root, "folder"), tmp_path / "out")
            assert (tmp_path / "out" / "file").read_bytes() == data
            flaky.cut = 100
            with pytest.raises(StorageError, match=r"folder/file: "):
                storage.download_folder(storage.join(s3_root, "folder"), tmp_path / "out")
        finally:
            storage._client.cache_clear()
