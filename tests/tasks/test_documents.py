"""Documents: real PDFs, good, bad and malicious, on disk and on S3; and OCR JSONL of every kind of wrong; and both."""

import hashlib
import json
import os
import random
from collections import Counter
from pathlib import Path

import pymupdf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks import artifact, documents, storage
from tasks.artifact import Artifact
from tasks.config import Ingest
from tasks.documents import check_name, read_documents
from tasks.errors import InputError
from tasks.pdf import read_pdf
from tasks.set_aside import Refused, printable


def pdf(*texts: str, title: str = "", password: str | None = None) -> bytes:
    """A PDF of one page a text; an empty text gives a page without a text layer."""
    document = pymupdf.open()
    for text in texts:
        page = document.new_page()
        if text:
            page.insert_text((72, 72), text)
    document.set_metadata({"title": title})
    options = {"encryption": pymupdf.PDF_ENCRYPT_AES_256, "user_pw": password, "owner_pw": "o"} if password else {}
    return document.tobytes(no_new_id=True, **options)


NO_PAGES = b"%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n2 0 obj<</Type/Pages/Kids[]/Count 0>>endobj\n" + (
    b"trailer<</Root 1 0 R/Size 3>>\nstartxref\n0\n%%EOF\n"
)


def bomb() -> bytes:
    """A PDF of 3 kB that takes a reader thousands of years: forms that draw forms, ten times each, twelve deep."""
    document = pymupdf.open()
    page = document.new_page()
    forms = [document.get_new_xref() for _ in range(12)]
    for form, inner in zip(forms, [*forms[1:], None], strict=True):
        resources = f"/Resources<</XObject<</F {inner} 0 R>>>>" if inner else ""
        document.update_object(form, f"<</Type/XObject/Subtype/Form/BBox[0 0 9 9]{resources}>>")
        document.update_stream(form, b"/F Do " * 10 if inner else b"")
    contents = document.get_new_xref()
    document.update_object(contents, "<<>>")
    document.update_stream(contents, b"/F Do")
    document.xref_set_key(page.xref, "Resources", f"<</XObject<</F {forms[0]} 0 R>>>>")
    document.xref_set_key(page.xref, "Contents", f"{contents} 0 R")
    return document.tobytes()


def ingest(
    root: str, source: str | None, workers: int = 1, *, ocr_file: str | None = None
) -> tuple[Artifact, Artifact]:
    uris = [storage.join(root, name) for name in ("out/pages.parquet", "out/set_aside.parquet")]
    return read_documents(Ingest(documents=source, ocr_file=ocr_file, workers=workers), *uris)


def reasons(set_aside: Artifact) -> dict[str, str]:
    return {row["source"]: row["reason"] for row in artifact.read_rows(set_aside)}


def put(root: str, files: dict[str, bytes]) -> str:
    for name, data in files.items():
        storage.write_bytes(storage.join(root, "in", name), data)
    return storage.join(root, "in")


def test_pdfs_become_pages(storage_root: str) -> None:
    folder = put(
        storage_root,
        {
            "b.pdf": pdf("bravo one", "", "bravo three", title="  The \n B file "),
            "a/deep/a é.PDF": pdf("alpha"),
        },
    )
    seen: list[tuple[int, int]] = []
    uris = [storage.join(storage_root, name) for name in ("p.parquet", "s.parquet")]
    pages, set_aside = read_documents(Ingest(documents=folder + "/", workers=1), *uris, lambda *done: seen.append(done))
    rows = artifact.read_rows(pages)
    assert [(r["file"], r["page_number"], r["total_pages"], r["title"], r["text"].strip()) for r in rows] == [
        ("a/deep/a é.PDF", 1, 1, "a é", "alpha"),
        ("b.pdf", 1, 3, "The B file", "bravo one"),
        ("b.pdf", 2, 3, "The B file", ""),
        ("b.pdf", 3, 3, "The B file", "bravo three"),
    ]
    assert {r["text_source"] for r in rows} == {"pdf"}
    assert storage.read_bytes(rows[1]["source_uri"]) == storage.read_bytes(storage.join(folder, "b.pdf"))
    assert (pages.rows, set_aside.rows) == (4, 0)
    assert seen == [(1, 2), (2, 2)]


@pytest.mark.parametrize("storage_root", ["local", "s3"], indirect=True)  # SeaweedFS takes no name with ".."
def test_bad_pdfs_are_set_aside_and_the_rest_goes_on(storage_root: str) -> None:
    whole = pdf("one", "two", "three")
    hidden = "up/../hidden.pdf" if storage.is_s3(storage_root) else "line\nbreak.pdf"  # each can hold but one of them
    folder = put(
        storage_root,
        {
            "good.pdf": pdf("fine"),
            "cut early.pdf": whole[: len(whole) // 3],
            "cut late.pdf": whole[:-40],
            "empty.pdf": b"",
            "encrypted.pdf": pdf("secret", password="hunter2"),
            "garbage.pdf": b"%PDF-1.7\n" + b"\x00garbage" * 99 + b"\n%%EOF",
            hidden: pdf("hidden"),
            "none.pdf": NO_PAGES,
            "notes.txt": b"not a candidate",
            "page.pdf": b"<html>404</html>",
            "scan.pdf": pdf("", ""),
        },
    )
    pages, set_aside = ingest(storage_root, folder)
    assert reasons(set_aside) == {
        "cut early.pdf": "truncated",
        "cut late.pdf": "truncated",
        "empty.pdf": "empty_file",
        "encrypted.pdf": "encrypted",
        "garbage.pdf": "damaged",
        printable(hidden): "bad_name",
        "none.pdf": "no_pages",
        "notes.txt": "not_pdf",
        "page.pdf": "not_pdf",
    }
    assert Counter(row["file"] for row in artifact.read_rows(pages)) == {"good.pdf": 1, "scan.pdf": 2}


def test_a_pdf_that_kills_its_reader_costs_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "CPU_LIMIT_S", 1.0)
    good = {f"{n}.pdf": pdf(f"text {n}") for n in range(6)}
    folder = put(str(tmp_path), good | {"1 bomb.pdf": bomb()})
    pages, set_aside = ingest(str(tmp_path), folder, workers=2)
    assert reasons(set_aside) == {"1 bomb.pdf": "crashed"}
    assert [row["text"].strip() for row in artifact.read_rows(pages)] == [f"text {n}" for n in range(6)]


def test_order_and_times_change_no_byte(tmp_path: Path) -> None:
    names = [f"{n}.pdf" for n in range(6)] + ["sub/0.pdf"]
    contents = {name: pdf(f"page of {name}", "second") for name in names}
    made = []
    for turn in range(2):
        random.Random(turn).shuffle(names)
        for when, name in enumerate(names):
            path = tmp_path / "in" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            path.write_bytes(contents[name])
            os.utime(path, (when + turn, when + turn))
        made.append(ingest(str(tmp_path), str(tmp_path / "in"), workers=turn + 1))
    assert made[0] == made[1]


@pytest.mark.parametrize("files", [{}, {"a.txt": b"x"}, {"a.pdf": b"", "b.pdf": b"junk"}])
def test_a_folder_of_nothing_is_an_error_that_names_it(storage_root: str, files: dict[str, bytes]) -> None:
    folder = put(storage_root, files)
    with pytest.raises(InputError, match="no usable PDF") as error:
        ingest(storage_root, folder)
    assert folder in str(error.value)
    assert all(name in str(error.value) for name in files)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_no_bytes_make_the_reader_raise(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Random bytes, and a real PDF with bytes of it changed or cut."""
    content = bytearray(data.draw(st.sampled_from([b"", b"%PDF-1.7\n", pdf("some", "text", title="t"), NO_PAGES])))
    for _ in range(data.draw(st.integers(0, 8))):
        start = data.draw(st.integers(0, len(content)))
        content[start : start + data.draw(st.integers(0, 60))] = data.draw(st.binary(max_size=30))
    path = tmp_path_factory.mktemp("fuzz") / "x.pdf"
    path.write_bytes(content)
    result = read_pdf(str(path), 60.0)
    assert (result.refused is None) == bool(result.texts)
    json.dumps(result).encode()  # valid UTF-8 throughout


@pytest.mark.parametrize("name", ["a.pdf", "a/b c/é中.pdf", "..a.pdf", "x" * 255, "/".join(["y" * 200] * 5)])
def test_good_names(name: str) -> None:
    check_name(name)


@pytest.mark.parametrize("name", ["x" * 300, "é" * 128, "a/" * 600 + "b"])
def test_names_that_are_too_long(name: str) -> None:
    with pytest.raises(Refused, match="bytes"):
        check_name(name)


@pytest.mark.parametrize(
    "name",
    ["", "/", "/etc/x.pdf", "a//b", "a/../b", "../a", "a/..", "./a", "a\nb", "a\x00", "a\x7f", "\u2028", "\ud800"],
)
def test_bad_names(name: str) -> None:
    with pytest.raises(Refused, match="bad_name"):
        check_name(name)


# ---- OCR JSONL


def page(**fields: object) -> dict[str, object]:
    return {"file": "a.pdf", "page_number": 1, "total_pages": 3, "text": "words", **fields}


def jsonl(*rows: object) -> bytes:
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


def test_ocr_jsonl_becomes_pages(storage_root: str) -> None:
    rows = [page(page_number=2), page(file="x/b.pdf", text="été\x00"), page(), page(page_number=3, text="")]
    uri = storage.join(storage_root, "ocr.jsonl")
    storage.write_bytes(uri, b"\xef\xbb\xbf" + jsonl(*rows[:2]) + b"\n  \r\n" + jsonl(*rows[2:]))
    pages, set_aside = ingest(storage_root, None, ocr_file=uri)
    found = artifact.read_rows(pages)
    assert [(r["file"], r["page_number"], r["text"], r["title"]) for r in found] == [
        ("a.pdf", 1, "words", "a"),
        ("a.pdf", 2, "words", "a"),
        ("a.pdf", 3, "", "a"),
        ("x/b.pdf", 1, "été", "b"),
    ]
    assert {(r["text_source"], r["source_uri"]) for r in found} == {("ocr_jsonl", None)}
    assert set_aside.rows == 0


BAD_ROWS: list[tuple[object, str]] = [
    (b"{not json", "bad_json"),
    (b"[1, 2]", "bad_json"),
    (b"1" * 5000, "bad_json"),
    (b"[" * 100_000, "bad_json"),
    (b'{"file": "\xff"}', "broken_utf8"),
    (b'{"file": "a.pdf", "page_number": 1, "total_pages": 1, "text": "\\ud800"}', "broken_utf8"),
    ({"file": "a.pdf", "page_number": 1, "text": "no total"}, "missing_field"),
    (page(file=None), "missing_field"),
    (page(file=3), "wrong_type"),
    (page(page_number="1"), "wrong_type"),
    (page(page_number=True), "wrong_type"),
    (page(page_number=1.0), "wrong_type"),
    (page(text=["a"]), "wrong_type"),
    (page(page_number=0), "bad_page_number"),
    (page(page_number=-1), "bad_page_number"),
    (page(page_number=4), "bad_page_number"),
    (page(total_pages=2**31), "bad_number"),
    (page(text="the same page again"), "duplicate_page"),
    (page(file="../a.pdf"), "bad_name"),
    (page(file="a\nb.pdf"), "bad_name"),
    (page(file="a" * 300), "bad_name"),
]


def test_bad_ocr_rows_are_set_aside_by_row(storage_root: str) -> None:
    uri = storage.join(storage_root, "ocr.jsonl")
    storage.write_bytes(uri, jsonl(page(), *(row for row, _ in BAD_ROWS)))
    pages, set_aside = ingest(storage_root, None, ocr_file=uri)
    assert [row["text"] for row in artifact.read_rows(pages)] == ["words"]
    found = [(row["source"], row["row"], row["reason"]) for row in artifact.read_rows(set_aside)]
    assert found == [("ocr.jsonl", number, reason) for number, (_, reason) in enumerate(BAD_ROWS, start=2)]


def test_the_order_of_ocr_rows_changes_no_byte(tmp_path: Path) -> None:
    rows = [page(file=f"{d}.pdf", page_number=p, text=f"{d} {p}") for d in "bac" for p in (3, 1, 2)]
    made = set()
    for turn in range(3):
        random.Random(turn).shuffle(rows)
        (tmp_path / "ocr.jsonl").write_bytes(jsonl(*rows))
        made.add(ingest(str(tmp_path), None, ocr_file=str(tmp_path / "ocr.jsonl"))[0].sha256)
    assert len(made) == 1


@pytest.mark.parametrize("content", [None, b"", b"\n\n", b"nonsense\n{}\n"])
def test_ocr_jsonl_of_nothing_is_an_error_that_names_it(storage_root: str, content: bytes | None) -> None:
    uri = storage.join(storage_root, "ocr.jsonl")
    if content is not None:
        storage.write_bytes(uri, content)
    with pytest.raises(InputError, match=r"ocr\.jsonl") as error:
        ingest(storage_root, None, ocr_file=uri)
    if content and content.strip():
        assert "row 1: bad_json" in str(error.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=4,
)
ROW = st.one_of(
    st.binary(max_size=40).map(lambda b: b.replace(b"\n", b"")),
    JSON,
    st.fixed_dictionaries({"file": st.text(max_size=4) | JSON, "page_number": st.integers(-1, 4) | JSON})
    .flatmap(lambda row: st.just({**page(), **row}))
    .filter(lambda row: isinstance(row, dict)),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows=st.lists(ROW, max_size=8))
def test_every_ocr_row_is_a_page_or_set_aside(tmp_path_factory: pytest.TempPathFactory, rows: list[object]) -> None:
    folder = tmp_path_factory.mktemp("ocr")
    (folder / "ocr.jsonl").write_bytes(jsonl(page(file="certain"), *rows))
    pages, set_aside = ingest(str(folder), None, ocr_file=str(folder / "ocr.jsonl"))
    blank = sum(isinstance(row, bytes) and not row.strip() for row in rows)
    assert pages.rows + set_aside.rows == 1 + len(rows) - blank
    found = [(row["file"], row["page_number"]) for row in artifact.read_rows(pages)]
    assert found == sorted(set(found))


# ---- PDFs and the OCR file of them


def test_an_ocr_file_says_what_stands_on_the_pages_of_pdfs(storage_root: str) -> None:
    folder = put(
        storage_root,
        {
            "a.pdf": pdf("of the PDF", "of the PDF", "of the PDF", title="The A file"),
            "b/b.pdf": pdf("bravo"),
            "locked.pdf": pdf("secret", password="hunter2"),
            "z.pdf": pdf("zulu"),
        },
    )
    rows = [
        page(file="lost.pdf", page_number=2, text="lost"),
        page(file="locked.pdf", total_pages=1),
        page(page_number=3, text=""),
        page(page_number=4, total_pages=4, text="beyond"),
        page(page_number=1),
        page(file="b/b.pdf", total_pages=1, text="by OCR"),
    ]
    uri = storage.join(storage_root, "ocr.jsonl")
    storage.write_bytes(uri, jsonl(*rows))
    pages, set_aside = ingest(storage_root, folder, ocr_file=uri)
    found = artifact.read_rows(pages)
    assert [
        (r["file"], r["page_number"], r["total_pages"], r["title"], r["text"].strip(), r["text_source"]) for r in found
    ] == [
        ("a.pdf", 1, 3, "The A file", "words", "ocr_jsonl"),
        ("a.pdf", 2, 3, "The A file", "of the PDF", "pdf"),
        ("a.pdf", 3, 3, "The A file", "", "ocr_jsonl"),
        ("b/b.pdf", 1, 1, "b", "by OCR", "ocr_jsonl"),
        ("locked.pdf", 1, 1, "locked", "words", "ocr_jsonl"),
        ("lost.pdf", 2, 3, "lost", "lost", "ocr_jsonl"),
        ("z.pdf", 1, 1, "z", "zulu", "pdf"),
    ]
    assert {row["file"] for row in found if row["source_uri"] is None} == {"locked.pdf", "lost.pdf"}
    for row in found:
        if row["source_uri"]:
            assert hashlib.sha256(storage.read_bytes(row["source_uri"])).hexdigest() == row["source_sha256"]
    assert [(r["source"], r["row"], r["reason"], r["detail"]) for r in artifact.read_rows(set_aside)] == [
        ("a.pdf", None, "no_ocr_row", "1 of 3 pages"),
        ("locked.pdf", None, "encrypted", "needs a password"),
        ("locked.pdf", None, "no_pdf", "1 pages"),
        ("lost.pdf", None, "no_pdf", "1 pages"),
        ("ocr.jsonl", 4, "bad_page_number", "page 4 of a.pdf, a PDF of 3 pages"),
        ("z.pdf", None, "no_ocr_row", "1 of 1 pages"),
    ]


def test_an_ocr_file_that_is_of_none_of_the_pdfs_is_an_error_that_shows_both_names(tmp_path: Path) -> None:
    folder = put(str(tmp_path), {"deep/a.pdf": pdf("alpha")})
    (tmp_path / "ocr.jsonl").write_bytes(jsonl(page()))
    with pytest.raises(
        InputError, match=r"ocr\.jsonl: none of its documents .* such as 'deep/a\.pdf', and not 'a\.pdf'"
    ):
        ingest(str(tmp_path), folder, ocr_file=str(tmp_path / "ocr.jsonl"))


def test_without_a_usable_pdf_an_ocr_file_does_not_hide_that_they_are_missing(tmp_path: Path) -> None:
    (tmp_path / "ocr.jsonl").write_bytes(jsonl(page()))
    for files, why in (
        ({}, "(it is empty|nothing lies there)"),
        ({"a.pdf": b"junk"}, r"could be used: a\.pdf: not_pdf"),
    ):
        folder = put(str(tmp_path), files)
        with pytest.raises(InputError, match=f"no usable PDF; .*{why}"):
            ingest(str(tmp_path), folder, ocr_file=str(tmp_path / "ocr.jsonl"))
