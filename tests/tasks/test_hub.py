"""Names of data sets, the commit that a hub has, and what becomes of a hub that does not answer."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks import hub
from tasks.cache import content_fingerprint
from tasks.errors import ConfigError

PART = st.text("abcXYZ019._-/", min_size=1, max_size=8)
MAYBE = st.none() | PART


@given(st.builds(hub.DatasetName, st.just("no-folder/") | PART.map("org/".__add__), MAYBE, MAYBE, MAYBE))
def test_a_name_is_what_it_says(name: hub.DatasetName) -> None:
    assert hub.parse(str(name)) == name


@pytest.mark.parametrize("uri", ["hf:", "hf:a:b:c", "hf:a#b@c", "hf:a@", "hf::train"])
def test_no_name(uri: str) -> None:
    with pytest.raises(ConfigError, match="REVISION"):
        hub.parse(uri)


def _rows(uri: str) -> dict[str, list[object]]:
    return {split: [row for _, row in rows] for split, rows in hub.read_dataset(uri)}


def test_folders_of_all_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    card = "configs:\n" + "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}.parquet\n" for name in ("en", "de")
    )
    folder = tmp_path / "parquet"
    folder.mkdir()
    (folder / "README.md").write_text(f"---\n{card}---\n")
    for name in ("en", "de"):
        pq.write_table(pa.table({"id": [name]}), folder / f"{name}.parquet")
    assert _rows(f"hf:{folder}#de:train") == {f"hf:{folder}#de:train": [{"id": "de"}]}
    assert _rows(f"hf:{folder}#en") == {f"hf:{folder}#en:train": [{"id": "en"}]}

    saved = tmp_path / "saved"
    datasets.DatasetDict({s: datasets.Dataset.from_dict({"id": [s]}) for s in ("train", "test")}).save_to_disk(saved)
    assert _rows(f"hf:{saved}") == {f"hf:{saved}:{split}": [{"id": split}] for split in ("test", "train")}
    assert _rows(f"hf:{saved}:test") == {f"hf:{saved}:test": [{"id": "test"}]}

    before = content_fingerprint(f"hf:{folder}#en")
    assert len({before, content_fingerprint(f"hf:{folder}#de"), content_fingerprint(f"hf:{folder}#en:train")}) == 3
    pq.write_table(pa.table({"id": ["other"]}), folder / "en.parquet")
    assert content_fingerprint(f"hf:{folder}#en") != before
    with pytest.raises(ConfigError, match="no revisions"):
        hub.parse(f"hf:{folder}@main")


class _Hub(BaseHTTPRequestHandler):
    """Knows one data set, whose newest commit is `commit`, tagged v1 at another."""

    commit = "a" * 40

    def do_GET(self) -> None:
        known = {"main": self.commit, "v1": "1" * 40}
        sha = known.get(
            self.path.split("?")[0].removeprefix("/api/datasets/org/set").removeprefix("/revision/") or "main"
        )
        body = json.dumps({"id": "org/set", "sha": sha} if sha else {"error": "Repository not found"}).encode()
        self.send_response(200 if sha else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_a_name_is_pinned_to_the_commit_that_the_hub_has(monkeypatch: pytest.MonkeyPatch) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    try:
        assert hub.pinned("hf:org/set#en:train") == f"hf:org/set@{'a' * 40}#en:train"
        assert hub.pinned("hf:org/set@v1") == f"hf:org/set@{'1' * 40}"
        assert hub.pinned("hf:org/other:train") == "hf:org/other:train"
        before = content_fingerprint(hub.pinned("hf:org/set"))
        monkeypatch.setattr(_Hub, "commit", "b" * 40)
        assert content_fingerprint(hub.pinned("hf:org/set")) != before
    finally:
        server.shutdown()
        server.server_close()
    assert hub.pinned("hf:org/set") == "hf:org/set"


def test_a_hub_that_does_not_answer_says_what_to_do(tmp_path: Path) -> None:
    program = (
        "from tasks.hub import pinned, read_dataset\nfrom tasks.errors import InputError\n"
        "try:\n    list(read_dataset(pinned('hf:some-one/no-such-data-set:train')))\n"
        "except InputError as error:\n    print(error)\n"
    )
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    said = subprocess.run([sys.executable, "-c", program], env=offline, capture_output=True, text=True, timeout=120)
    assert "hf:some-one/no-such-data-set:train" in said.stdout
    assert "HF_TOKEN" in said.stdout
