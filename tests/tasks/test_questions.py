"""Questions: every spelling is read, every wrong row is set aside by its number, and splits keep documents apart."""

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks import artifact, storage
from tasks.artifact import Artifact
from tasks.config import Ingest
from tasks.errors import ConfigError, InputError
from tasks.questions import read_questions
from tasks.splits import assign_splits

FILES = {"a.pdf": 3, "b:2.pdf": 2, "dir/c.pdf": 1}


def pages(root: str, files: dict[str, int]) -> Artifact:
    rows = [
        {"file": f, "page_number": n, "text": f"{n} of {f}"} for f, total in files.items() for n in range(1, total + 1)
    ]
    return artifact.write_table(artifact.table_of(rows, "pages/2"), storage.join(root, "pages.parquet"), "pages/2", {})


def question(**fields: object) -> dict[str, object]:
    where = [{"document": "a.pdf", "page": 1}]
    return {"id": "q", "question": "Why?", "answers": [["so"]], "answer_locations": where, "category": "c", **fields}


def jsonl(*rows: object) -> bytes:
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


def read(root: str, source: str, files: dict[str, int] = FILES, **setting: Any) -> tuple[Artifact, Artifact]:
    uris = [storage.join(root, name) for name in ("out/questions.parquet", "out/set_aside.parquet")]
    return read_questions(Ingest(documents="unused", questions=source, **setting), pages(root, files), *uris)


def read_jsonl(root: str, *rows: object, **setting: Any) -> tuple[Artifact, Artifact]:
    uri = storage.join(root, "questions.jsonl")
    storage.write_bytes(uri, jsonl(*rows))
    return read(root, uri, **setting)


def one(root: str, **fields: object) -> dict[str, Any]:
    questions, set_aside = read_jsonl(root, question(**fields))
    assert set_aside.rows == 0
    return artifact.read_rows(questions)[0]


def test_questions_are_read(storage_root: str) -> None:
    locations = [{"document": "dir/c.pdf", "page": 1}, {"document": "a.pdf", "page": 3}]
    found = one(storage_root, id="q7", question=" What is é? ", answers=[["x", "y"], ["z"]], answer_locations=locations)
    assert (found["question_id"], found["question"], found["category"]) == ("q7", "What is é?", "c")
    assert found["answers"] == [["x", "y"], ["z"]]
    assert found["answer_locations"] == locations
    assert [(found["group"], found["split"])] == assign_splits([["a.pdf", "dir/c.pdf"]], 0.6, 0.1, "drag")


@pytest.mark.parametrize(
    ("answers", "read_as"),
    [("yes", [["yes"]]), (["yes", "no"], [["yes"], ["no"]]), ([["a", "b"], ["c"]], [["a", "b"], ["c"]])],
)
def test_spellings_of_answers(tmp_path: Path, answers: object, read_as: list[list[str]]) -> None:
    for name in ("answers", "answer", "answer_variants"):
        assert one(str(tmp_path), **{"answers": None, name: answers})["answers"] == read_as


@pytest.mark.parametrize(
    "locations",
    [
        ["a.pdf:3", "b:2.pdf:1"],
        [{"file": "a.pdf", "page": 3}, {"file": "b:2.pdf", "page_number": 1}],
        [{"document": "a.pdf", "page": 3}, "b:2.pdf:1", {"document": "a.pdf", "page": 3, "bbox": [1, 2]}],
    ],
)
def test_spellings_of_locations(tmp_path: Path, locations: list[object]) -> None:
    for name in ("answer_locations", "evidence"):
        found = one(str(tmp_path), **{"answer_locations": None, name: locations})["answer_locations"]
        assert found == [{"document": "a.pdf", "page": 3}, {"document": "b:2.pdf", "page": 1}]


def test_other_spellings(tmp_path: Path) -> None:
    assert one(str(tmp_path), id=None, question_id="x")["question_id"] == "x"
    assert one(str(tmp_path), id=12)["question_id"] == "12"
    assert one(str(tmp_path), category=None, document_category="d")["category"] == "d"
    assert one(str(tmp_path), category=None)["category"] is None


def test_parquet_is_read_like_jsonl(storage_root: str, tmp_path: Path) -> None:
    rows = [question(id=f"q{n}", answer_locations=[{"document": "a.pdf", "page": n}]) for n in range(1, 5)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "q.parquet", row_group_size=2)
    uri = storage.join(storage_root, "questions.parquet")
    storage.write_bytes(uri, (tmp_path / "q.parquet").read_bytes())
    from_parquet, set_aside = read(storage_root, uri)
    assert [(r["row"], r["reason"]) for r in artifact.read_rows(set_aside)] == [(4, "unknown_page")]
    assert from_parquet.sha256 == read_jsonl(storage_root, *rows)[0].sha256


def test_parquet_with_broken_text(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([question(id="good"), question(id="XXXX")])
    raw = pa.array([b"good", b"\xff\xfe"]).view(pa.string())
    pq.write_table(table.set_column(table.column_names.index("id"), "id", raw), tmp_path / "q.parquet")
    questions, set_aside = read(str(tmp_path), str(tmp_path / "q.parquet"))
    assert [row["question_id"] for row in artifact.read_rows(questions)] == ["good"]
    assert [(row["row"], row["reason"]) for row in artifact.read_rows(set_aside)] == [(2, "broken_utf8")]


def test_data_sets_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "hub").mkdir()
    for split in ("train", "test"):
        rows = [question(id=f"{split}{n}") for n in range(2)] + [question(id="q", question="")]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "hub" / f"{split}.parquet")
    questions, set_aside = read(str(tmp_path), f"hf:{tmp_path}/hub")
    assert [row["question_id"] for row in artifact.read_rows(questions)] == ["test0", "test1", "train0", "train1"]
    assert [(row["source"], row["row"], row["reason"]) for row in artifact.read_rows(set_aside)] == [
        (f"hf:{tmp_path}/hub:{split}", 3, "empty_question") for split in ("test", "train")
    ]
    assert read(str(tmp_path), f"hf:{tmp_path}/hub:train")[0].rows == 2
    with pytest.raises(InputError, match="nosuch"):
        read(str(tmp_path), f"hf:{tmp_path}/hub:nosuch")


BAD_ROWS: list[tuple[object, str]] = [
    (b"{", "bad_json"),
    (b'"a text"', "bad_json"),
    (b'{"id": "\xc3("}', "broken_utf8"),
    (question(id="s", question="half a pair \ud800"), "broken_utf8"),
    (question(), "duplicate_id"),
    (question(id=None), "missing_field"),
    (question(id="  "), "missing_field"),
    (question(id=["a"]), "wrong_type"),
    (question(id=True), "wrong_type"),
    (question(id="1", question=None), "missing_field"),
    (question(id="2", question=" \n"), "empty_question"),
    (question(id="3", question={"en": "Why?"}), "wrong_type"),
    (question(id="4", answers=None), "missing_field"),
    (question(id="5", answers=[]), "bad_answers"),
    (question(id="6", answers={"a": 1}), "bad_answers"),
    (question(id="7", answers=[["a"], "b"]), "bad_answers"),
    (question(id="8", answers=[[]]), "bad_answers"),
    (question(id="9", answers=[[["a"]]]), "wrong_type"),
    (question(id="10", answers=[[1]]), "wrong_type"),
    (question(id="11", answers=" "), "bad_answers"),
    (question(id="12", answer_locations=None), "missing_field"),
    (question(id="13", answer_locations=[]), "bad_location"),
    (question(id="14", answer_locations="a.pdf:1"), "bad_location"),
    (question(id="15", answer_locations=["a.pdf"]), "bad_location"),
    (question(id="16", answer_locations=["a.pdf:one"]), "bad_location"),
    (question(id="17", answer_locations=["a.pdf:" + "9" * 30]), "bad_location"),
    (question(id="18", answer_locations=[["a.pdf", 1]]), "wrong_type"),
    (question(id="19", answer_locations=[{"document": "a.pdf"}]), "missing_field"),
    (question(id="20", answer_locations=[{"document": "a.pdf", "page": "1"}]), "wrong_type"),
    (question(id="21", answer_locations=[{"document": "z.pdf", "page": 1}]), "unknown_document"),
    (question(id="22", answer_locations=[{"document": "a.pdf", "page": 4}]), "unknown_page"),
    (question(id="23", answer_locations=["a.pdf:0", "z.pdf:1"]), "unknown_page"),
    (question(id="24", category=["c"]), "wrong_type"),
]


def test_bad_rows_are_set_aside_by_row(storage_root: str) -> None:
    questions, set_aside = read_jsonl(storage_root, question(), *(row for row, _ in BAD_ROWS))
    assert [row["question_id"] for row in artifact.read_rows(questions)] == ["q"]
    found = [(row["source"], row["row"], row["reason"]) for row in artifact.read_rows(set_aside)]
    assert found == [("questions.jsonl", number, reason) for number, (_, reason) in enumerate(BAD_ROWS, start=2)]


def test_a_question_is_kept_with_its_good_locations(storage_root: str) -> None:
    locations = ["a.pdf:2", "z.pdf:1", {"document": "a.pdf", "page": 9}, 7]
    questions, set_aside = read_jsonl(storage_root, question(answer_locations=locations))
    assert artifact.read_rows(questions)[0]["answer_locations"] == [{"document": "a.pdf", "page": 2}]
    noted = artifact.read_rows(set_aside)
    assert [(row["row"], row["reason"]) for row in noted] == [(1, "location_dropped")] * 3
    assert {"z.pdf", "page 9 of a.pdf"} <= {row["detail"] for row in noted}


MANY = {f"{n}.pdf": 2 for n in range(30)}


def many() -> list[dict[str, object]]:
    draw = random.Random(3)
    return [
        question(id=f"q{n:02}", answer_locations=[f"{d}.pdf:1" for d in draw.sample(range(30), draw.choice((1, 1, 2)))])
        for n in range(25)
    ]


def test_order_changes_no_byte(tmp_path: Path) -> None:
    rows, made = many(), set()
    for turn in range(3):
        random.Random(turn).shuffle(rows)
        made.add(read_jsonl(str(tmp_path), *rows, files=MANY)[0].sha256)
    assert len(made) == 1


def test_no_document_is_in_two_splits(tmp_path: Path) -> None:
    questions, _ = read_jsonl(str(tmp_path), *many(), files=MANY, train_ratio=0.4, dev_ratio=0.3)
    splits: dict[str, set[str]] = {}
    for row in artifact.read_rows(questions):
        for location in row["answer_locations"]:
            splits.setdefault(location["document"], set()).add(row["split"])
    assert all(len(found) == 1 for found in splits.values())
    assert set.union(*splits.values()) == {"train", "dev", "test"}


def listed(root: str, name: str, names: object) -> str:
    uri = storage.join(root, name)
    storage.write_bytes(uri, json.dumps(names).encode())
    return uri


def test_copies_of_a_document_are_in_one_split(tmp_path: Path) -> None:
    """Of scans without text nothing tells that they are copies."""
    texts = {f"{n:02}.pdf": f"text {n % 20}" if n < 40 else " " for n in range(60)}
    rows = [{"file": file, "page_number": 1, "total_pages": 1, "text": text} for file, text in texts.items()]
    table = artifact.table_of(rows, "pages/2")
    stored = artifact.write_table(table, str(tmp_path / "pages.parquet"), "pages/2", {})
    source = tmp_path / "questions.jsonl"
    asked = [question(id=file, answer_locations=[{"document": file, "page": 1}]) for file in texts]
    source.write_bytes(jsonl(*asked))
    setting = Ingest(documents="unused", questions=str(source))
    made, _ = read_questions(setting, stored, str(tmp_path / "q.parquet"), str(tmp_path / "aside.parquet"))
    groups = {row["question_id"]: (row["group"], row["split"]) for row in artifact.read_rows(made)}
    assert all(groups[f"{n:02}.pdf"] == groups[f"{n + 20:02}.pdf"] for n in range(20))
    assert len({group for group, _ in groups.values()}) == 40
    assert {split for _, split in groups.values()} == {"train", "dev", "test"}


def test_include_and_exclude_lists(storage_root: str) -> None:
    rows = [
        question(id="both", answer_locations=["a.pdf:1", "dir/c.pdf:1"]),
        question(id="first", answer_locations=["a.pdf:2"]),
        question(id="other", answer_locations=["b:2.pdf:1"]),
        question(id="refused", answer_locations=["encrypted.pdf:1"]),
    ]
    everything = {row["question_id"]: row for row in artifact.read_rows(read_jsonl(storage_root, *rows)[0])}

    def kept(**lists: list[str]) -> list[str]:
        files = {f"{kind}_json": listed(storage_root, f"{kind}.json", names) for kind, names in lists.items()}
        questions, set_aside = read_jsonl(storage_root, *rows, **files)
        left = artifact.read_rows(questions)
        assert all(row == everything[row["question_id"]] for row in left)  # groups and splits stay
        excluded = [row["detail"] for row in artifact.read_rows(set_aside) if row["reason"] == "excluded"]
        assert sorted([*excluded, *(row["question_id"] for row in left)]) == sorted(everything)
        return [row["question_id"] for row in left]

    assert kept(include=["a.pdf"]) == ["both", "first"]
    assert kept(include=["dir/c.pdf", "other"]) == ["both", "other"]
    assert kept(exclude=["dir/c.pdf"]) == ["first", "other"]
    assert kept(exclude=["first", "encrypted.pdf", "refused"]) == ["both", "other"]
    assert kept(include=["a.pdf", "other"], exclude=["both"]) == ["first", "other"]
    assert kept(exclude=[]) == ["both", "first", "other"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (["a.pdf", "typo.pdf", "q"], r"typo\.pdf"),
        ({"documents": ["a.pdf"]}, "must be a JSON list"),
        ([1], "must be a JSON list"),
        (["a.pdf"], "leave no question"),
    ],
)
def test_wrong_exclude_lists_are_errors(storage_root: str, content: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_jsonl(storage_root, question(), exclude_json=listed(storage_root, "list.json", content))


def test_lists_that_are_missing_or_no_json_are_errors(storage_root: str) -> None:
    uri = storage.join(storage_root, "list.json")
    with pytest.raises(InputError, match="no such file"):
        read_jsonl(storage_root, question(), include_json=uri)
    storage.write_bytes(uri, b"\xff[")
    with pytest.raises(InputError, match="not JSON"):
        read_jsonl(storage_root, question(), include_json=uri)


@pytest.mark.parametrize("content", [b"", b"\n", b"{}\nnonsense\n"])
def test_no_usable_question_is_an_error_that_names_file_and_rows(storage_root: str, content: bytes) -> None:
    uri = storage.join(storage_root, "questions.jsonl")
    storage.write_bytes(uri, content)
    with pytest.raises(InputError, match=r"questions\.jsonl: no usable question") as error:
        read(storage_root, uri)
    if b"nonsense" in content:
        assert "row 1: missing_field" in str(error.value)
        assert "row 2: bad_json" in str(error.value)


@pytest.mark.parametrize("name", ["gone.jsonl", "gone.parquet", "junk.parquet"])
def test_files_that_are_missing_or_damaged_are_named(storage_root: str, name: str) -> None:
    storage.write_bytes(storage.join(storage_root, "junk.parquet"), b"PAR1 junk PAR1")
    with pytest.raises(InputError, match=name):
        read(storage_root, storage.join(storage_root, name))


@pytest.mark.parametrize("source", [None, "questions.csv"])
def test_a_setting_of_no_known_kind_is_an_error(tmp_path: Path, source: Any) -> None:
    with pytest.raises(ConfigError, match=r"\.jsonl or \.parquet"):
        read(str(tmp_path), source)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6) | st.sampled_from(["a.pdf:1", "a.pdf"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["document", "file", "page", "x"]), inner, max_size=3)
    ),
    max_leaves=5,
)
FIELDS = st.dictionaries(st.sampled_from(["id", "question", "answers", "answer_locations", "category"]), JSON)
ROW = FIELDS.map(lambda fields: question(**fields)) | st.binary(max_size=30).map(
    lambda b: b.replace(b"\n", b"?") + b"?"
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows=st.lists(ROW, max_size=6))
def test_every_row_is_a_question_or_set_aside(tmp_path_factory: pytest.TempPathFactory, rows: list[object]) -> None:
    root = str(tmp_path_factory.mktemp("fuzz"))
    questions, set_aside = read_jsonl(root, question(id="certain"), *rows)
    lost = [row for row in artifact.read_rows(set_aside) if row["reason"] != "location_dropped"]
    assert questions.rows + len(lost) == 1 + len(rows)
