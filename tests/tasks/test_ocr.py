"""Scans: pages that are only pictures, read by the real Tesseract; and by one that crashes or hangs on some of them."""

import functools
import json
import os
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pymupdf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks import artifact, config, storage, tesseract
from tasks.artifact import Artifact
from tasks.config import Ingest, Scans
from tasks.documents import read_documents
from tasks.errors import ConfigError, InputError
from tasks.ocr import read_scans
from tasks.search.index import build_index, open_index
from tasks.tesseract import NotRead
from tests.servers import missing

WORDS = {"turbine": "The turbine rotates at nine thousand", "gasket": "Replace the gasket every second year"}
LONG = [f"Line {n} of a manual that was never on paper" for n in ("one", "two", "three", "four")]
WIDTHS = {"crash": 400, "hang": 404}  # points, by which the Tesseract of some tests knows a page


@pytest.fixture(autouse=True)
def _tesseract() -> None:
    if not shutil.which("tesseract"):
        missing("tesseract", "tesseract-ocr")


def text_page(*lines: str, width: float = 420) -> pymupdf.Document:
    document = pymupdf.open()
    page = document.new_page(width=width, height=200)
    for number, line in enumerate(lines):
        page.insert_text((20, 40 + 24 * number), line, fontsize=14)
    return document


def scanned(source: pymupdf.Document, into: pymupdf.Document, turned: int = 0) -> None:
    """Add a page that is a picture of another, by so many degrees turned."""
    pixmap = source[0].get_pixmap(matrix=pymupdf.Matrix(150 / 72, 150 / 72).prerotate(turned))
    page = into.new_page(width=pixmap.width * 72 / 150, height=pixmap.height * 72 / 150)
    page.insert_image(page.rect, pixmap=pixmap)


def scan(*texts: str, stamp: str = "", turned: int = 0, width: float = 420) -> bytes:
    """A PDF with a picture of each text, several times below each other, and a stamp that is text."""
    document = pymupdf.open()
    for text in texts:
        scanned(text_page(*[f"{text} {word}" for word in ("once", "again", "thrice")], width=width), document, turned)
        if stamp:
            document[-1].insert_text((20, 190), stamp, fontsize=8)
    return document.tobytes(no_new_id=True)


def put(root: str, files: dict[str, bytes]) -> str:
    folder = storage.join(root, "in")
    storage.delete(folder)
    for name, data in files.items():
        storage.write_bytes(storage.join(folder, name), data)
    return folder


def ingested(
    root: str, files: dict[str, bytes], **settings: object
) -> tuple[Artifact, Artifact, list[tuple[int, int]]]:
    """Pages, what was set aside, and the progress that was told."""
    seen: list[tuple[int, int]] = []
    at = functools.partial(storage.join, root)
    documents, _ = read_documents(Ingest(documents=put(root, files), workers=1), at("d.parquet"), at("sd.parquet"))
    made = read_scans(
        documents, Scans.model_validate(settings), at("in"), at("ocr"), at("pages.parquet"), at("aside.parquet"),
        workers=1, on_progress=lambda *done: seen.append(done),
    )  # fmt: skip
    return *made, seen


def noted(set_aside: Artifact) -> list[tuple[str, int | None, str]]:
    return [(row["source"], row["row"], row["reason"]) for row in artifact.read_rows(set_aside)]


def readings(root: str) -> list[str]:
    return list(storage.iter_files(storage.join(root, "ocr")))


@pytest.fixture
def instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """A `tesseract` that writes down each page it is given, crashes on some, hangs on some, and is the real one on others.

    Returns how many it was given.
    """
    calls = tmp_path / "calls"
    calls.touch()
    program = tmp_path / "bin" / "tesseract"
    program.parent.mkdir()
    crash, hang = (int(width * 200 / 72) for width in WIDTHS.values())
    program.write_text(
        f"#!{sys.executable}\n"
        "import os, signal, subprocess, sys, time\n"
        f"real = {shutil.which('tesseract')!r}\n"
        "if 'stdin' not in sys.argv:\n"
        "    os.execv(real, [real, *sys.argv[1:]])\n"
        "picture = sys.stdin.buffer.read()\n"
        f"open({str(calls)!r}, 'a').write('page\\n')\n"
        "width = int(picture.split()[1])\n"
        f"if abs(width - {crash}) < 3: os.kill(os.getpid(), signal.SIGSEGV)\n"
        f"if abs(width - {hang}) < 3: time.sleep(3600)\n"
        "sys.exit(subprocess.run([real, *sys.argv[1:]], input=picture).returncode)\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return lambda: len(calls.read_text().split())


def test_scans_become_text_that_is_found_and_known_as_such(storage_root: str) -> None:
    on_blue = text_page("Annual report")
    on_blue[0].draw_rect((0, 100, 420, 200), fill=(0, 0, 1))
    files = {
        "manual.pdf": text_page(*LONG).tobytes(),
        "scan.pdf": scan(*WORDS.values(), stamp="Case 12 page 3"),
        "title.pdf": text_page("Annual report").tobytes(),  # short, and nothing else is on it
        "title on blue.pdf": on_blue.tobytes(),  # short, and OCR finds no more
    }
    pages, set_aside, seen = ingested(storage_root, files)
    rows = {(row["file"], row["page_number"]): row for row in artifact.read_rows(pages)}
    sources = {page: row["text_source"] for page, row in rows.items()}
    assert sources == {
        ("manual.pdf", 1): "pdf",
        ("scan.pdf", 1): "ocr",
        ("scan.pdf", 2): "ocr",
        ("title on blue.pdf", 1): "pdf",
        ("title.pdf", 1): "pdf",
    }
    assert rows["scan.pdf", 1]["text"].splitlines()[:2] == [f"{WORDS['turbine']} once", f"{WORDS['turbine']} again"]
    assert all((row["confidence"] or 0) > 0.8 for page, row in rows.items() if sources[page] == "ocr")
    assert (
        rows["manual.pdf", 1]["confidence"]
        is rows["title on blue.pdf", 1]["confidence"]
        is rows["title.pdf", 1]["confidence"]
        is None
    )
    assert (noted(set_aside), seen) == ([], [(1, 3), (2, 3), (3, 3)])

    index = open_index(build_index(pages, config.Index(), storage.join(storage_root, "index")), config.Search())
    found = index.search("gasket", top_k=3).hits
    assert [(hit.file, hit.page_number) for hit in found] == [("scan.pdf", 2)]


def test_a_page_is_read_once_whatever_lies_beside_it(tmp_path: Path, instead: Callable[[], int]) -> None:
    root, first = str(tmp_path / "store"), scan(WORDS["turbine"])
    pages, _, _ = ingested(root, {"a.pdf": first})
    text = artifact.read_rows(pages)[0]["text"]
    assert (instead(), len(readings(root))) == (1, 1)
    more = {"other name.pdf": first, "b.pdf": scan(WORDS["gasket"])}
    again, _, _ = ingested(root, more)
    assert (instead(), len(readings(root))) == (2, 2)
    assert {row["file"]: row["text"] for row in artifact.read_rows(again)}["other name.pdf"] == text
    ingested(root, more, ocr_below=50)  # which pages are read is no way of reading
    assert instead() == 2

    Path(readings(root)[0]).write_bytes(b"{cut o")  # what is damaged is read again
    ingested(root, more)
    assert instead() == 3
    ingested(root, more, ocr_dpi=150)
    assert (instead(), len(readings(root))) == (5, 4)


def test_a_page_that_crashes_ocr_costs_only_itself(tmp_path: Path, instead: Callable[[], int]) -> None:
    crashing = {"a.pdf": scan(WORDS["turbine"]), "crash.pdf": scan("x", width=WIDTHS["crash"]), "z.pdf": scan("motor")}
    root = str(tmp_path / "store")
    pages, set_aside, seen = ingested(root, crashing)
    assert noted(set_aside) == [("crash.pdf", None, "no_text"), ("crash.pdf", 1, "ocr_failed")]
    assert "code -11" in artifact.read_rows(set_aside)[1]["detail"]
    assert [row["text_source"] for row in artifact.read_rows(pages)] == ["ocr", "pdf", "ocr"]
    assert (len(readings(root)), seen[-1]) == (2, (3, 3))  # the failure is not kept: the next ingest tries again


def test_a_page_on_which_ocr_hangs_is_given_up(instead: Callable[[], int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tesseract, "_DEADLINE_S", 0.5)
    with pytest.raises(NotRead, match="took longer than"):
        tesseract.read_page(text_page("x", width=WIDTHS["hang"])[0], "eng", 200)


def test_pictures_without_words_are_noted_and_those_on_their_head_are_turned(tmp_path: Path) -> None:
    photo = pymupdf.open()
    photo.new_page().draw_circle((300, 300), 200, fill=(0.5, 0.6, 0.7))
    prose = "The turbine rotates at nine thousand revolutions and must be stopped before the housing is opened"
    document = pymupdf.open()
    scanned(text_page(*[prose[start:] for start in range(0, 42, 6)], width=800), document, turned=180)
    pages, set_aside, _ = ingested(str(tmp_path), {"photo.pdf": photo.tobytes(), "turned.pdf": document.tobytes()})
    assert noted(set_aside) == [("photo.pdf", None, "no_text"), ("photo.pdf", 1, "no_words")]
    empty, turned = artifact.read_rows(pages)
    assert (empty["text"], empty["text_source"], empty["confidence"]) == ("", "pdf", None)
    assert prose in turned["text"]


def test_without_tesseract_the_rest_is_read_and_the_table_says_what_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"scan.pdf": scan("one", "two"), "text.pdf": text_page(*LONG).tobytes()}
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        pages, set_aside, seen = ingested(str(tmp_path), files)
        assert [(row["reason"], row["detail"]) for row in artifact.read_rows(set_aside)] == [("ocr_missing", "2 pages")]
        assert ([row["text_source"] for row in artifact.read_rows(pages)], seen) == (["pdf"] * 3, [])
        with pytest.raises(ConfigError, match="apt-get install tesseract-ocr"):
            ingested(str(tmp_path), {"scan.pdf": files["scan.pdf"]})
    _, set_aside, seen = ingested(str(tmp_path), files, ocr="off")
    assert (noted(set_aside), seen) == ([("scan.pdf", None, "no_text")], [])


def test_a_language_that_is_missing_is_an_error_where_a_page_needs_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="apt-get install tesseract-ocr-tlh-frak"):
        ingested(str(tmp_path), {"scan.pdf": scan("one")}, ocr_language="eng+tlh_frak")
    pages, set_aside, _ = ingested(str(tmp_path), {"t.pdf": text_page(*LONG).tobytes()}, ocr_language="tlh_frak")
    assert (pages.rows, set_aside.rows) == (1, 0)
    with pytest.raises(ValueError, match="pattern"):
        Scans(ocr_language="../eng")


def test_a_pdf_that_changed_meanwhile_is_an_error(tmp_path: Path) -> None:
    at = functools.partial(storage.join, str(tmp_path))
    folder = put(str(tmp_path), {"a.pdf": scan("one")})
    documents, _ = read_documents(Ingest(documents=folder, workers=1), at("d.parquet"), at("sd.parquet"))
    put(str(tmp_path), {"a.pdf": scan("two")})
    with pytest.raises(InputError, match=r"a\.pdf is not what was ingested"):
        read_scans(documents, Scans(), folder, at("ocr"), at("pages.parquet"), at("aside.parquet"), workers=1)


def test_scans_that_moved_since_their_text_layer_was_read_are_read_where_they_lie_now(tmp_path: Path) -> None:
    at = functools.partial(storage.join, str(tmp_path))
    folder = put(str(tmp_path), {"below/a.pdf": scan(WORDS["turbine"])})
    documents, _ = read_documents(Ingest(documents=folder, workers=1), at("d.parquet"), at("sd.parquet"))
    moved = str(Path(folder).rename(tmp_path / "moved"))
    rest = at("ocr"), at("pages.parquet"), at("aside.parquet")
    with pytest.raises(InputError, match=r"below/a\.pdf: .*nothing lies at .*run ingest"):
        read_scans(documents, Scans(), folder, *rest, workers=1)
    pages, _ = read_scans(documents, Scans(), moved, *rest, workers=1)
    assert WORDS["turbine"] in artifact.read_rows(pages)[0]["text"]


def test_which_languages_are_installed_changes_no_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"scan.pdf": scan(WORDS["turbine"])}
    pages, _, _ = ingested(str(tmp_path), files)
    found = tesseract.installed()
    assert found is not None
    more = found._replace(languages=(*found.languages, "tlh"))
    monkeypatch.setattr(tesseract, "installed", lambda: more)
    again, _, _ = ingested(str(tmp_path), files)
    assert again.sha256 == pages.sha256


def test_a_page_of_metres_is_rendered_within_bounds() -> None:
    document = pymupdf.open()
    document.new_page(width=14400, height=14400).insert_text((400, 7000), "Floor plan", fontsize=900)
    picture, dpi = tesseract._render(document[0], 600)
    _, width, height, _ = picture[:40].split(maxsplit=3)
    assert 0.95 * tesseract._MOST_PIXELS < int(width) * int(height) <= tesseract._MOST_PIXELS
    assert int(width) == 200 * dpi


def test_a_language_that_tesseract_refuses_is_said() -> None:
    with pytest.raises(NotRead, match="ended with code 1"):
        tesseract.read_page(text_page("words")[0], "nosuch", 100)


@given(lines=st.lists(st.lists(st.text("abc\u00e9", min_size=1, max_size=3), min_size=1, max_size=3), max_size=4))
def test_a_table_of_words_is_read_as_lines(lines: list[list[str]]) -> None:
    rows = ["header", "1\t1\t0\t0\t0\t0\t0\t0\t9\t9\t-1\t"]
    for number, line in enumerate(lines, 1):
        rows += [f"5\t1\t1\t1\t{number}\t{n}\t0\t0\t9\t9\t50.0\t{word}" for n, word in enumerate(line, 1)]
        rows.append(f"5\t1\t1\t1\t{number}\t9\t0\t0\t9\t9\t95.0\t ")  # a picture, to Tesseract a blank word
    reading = tesseract._reading("\n".join(rows))
    assert reading.text == "\n".join(" ".join(line) for line in lines)
    assert reading.confidence == (0.5 if lines else None)
    assert json.loads(json.dumps(reading._asdict())) == reading._asdict()


def test_a_page_that_the_users_ocr_has_read_is_not_read_again(tmp_path: Path, instead: Callable[[], int]) -> None:
    at = functools.partial(storage.join, str(tmp_path))
    folder = put(str(tmp_path), {"a.pdf": scan(WORDS["turbine"], WORDS["gasket"], "motor")})
    rows = [{"file": "a.pdf", "page_number": n, "total_pages": 3, "text": text} for n, text in ((1, "short"), (2, ""))]
    (tmp_path / "ocr.jsonl").write_text("\n".join(map(json.dumps, rows)))
    both = Ingest(documents=folder, ocr_file=at("ocr.jsonl"), workers=1)
    documents, _ = read_documents(both, at("d.parquet"), at("sd.parquet"))
    pages, _ = read_scans(documents, Scans(), folder, at("ocr"), at("pages.parquet"), at("aside.parquet"), workers=1)
    found = [(row["text_source"], row["text"].split("\n")[0]) for row in artifact.read_rows(pages)]
    assert found == [("ocr_jsonl", "short"), ("ocr_jsonl", ""), ("ocr", "motor once")]
    assert instead() == 1
