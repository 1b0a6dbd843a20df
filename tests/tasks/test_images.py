"""Page images of real PDFs: rendered once however many ask, kept for the next run, and found where the PDFs lie now."""

import asyncio
import base64
import os
import shutil
from pathlib import Path
from typing import Any

import pymupdf
import pytest

from tasks import artifact, config, documents, images, refs, storage
from tasks.artifact import Artifact
from tasks.errors import InputError
from tasks.images import PageImages
from tasks.pages import PageStore
from tasks.render import render_page
from tests.model_server import received

AGENT = config.Agent(observation="image")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two PDFs of three pages."""
    (tmp_path / "pdfs" / "below").mkdir(parents=True)
    for name in ("a.pdf", "below/b c.pdf"):
        pdf = pymupdf.open()
        for number in range(1, 4):
            pdf.new_page().insert_text((72, 72), f"Page {number} of {name}.")
        pdf.save(tmp_path / "pdfs" / name)
    return tmp_path / "pdfs"


def read(root: str, folder: Path) -> Artifact:
    settings = config.Ingest(documents=str(folder), workers=1)
    return documents.read_documents(
        settings, storage.join(root, "pages.parquet"), storage.join(root, "set_aside.parquet")
    )[0]


def opened(root: str, pages: Artifact, send: Any = "inline", agent: config.Agent = AGENT) -> PageImages:
    return PageImages(root, PageStore(pages), agent, send)


def stored(root: str) -> list[str]:
    return [uri for uri in storage.iter_files(images.folder(root)) if not uri.endswith(".json")]


async def test_a_page_is_rendered_once_although_64_rollouts_ask_for_it_at_once(
    storage_root: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[Any] = []
    run = images._Renderers.run

    async def counted(self: images._Renderers, *job: Any) -> str:
        jobs.append(job)
        return await run(self, *job)

    monkeypatch.setattr(images._Renderers, "run", counted)
    pages = read(storage_root, folder)
    async with opened(storage_root, pages) as store:
        asked = await asyncio.gather(*(store.image("a.pdf", 1 + n % 2) for n in range(64)))
        urls = await asyncio.gather(*(store.url(image) for image in asked if image))
    assert len(jobs) == len(stored(storage_root)) == len({image["key"] for image in asked if image}) == 2
    assert len(urls) == 64
    assert len({id(url) for url in urls}) == 2  # encoded once, and the same bytes for all
    for image, url in zip(asked, urls, strict=True):
        assert image is not None
        data = received(url.decode())
        assert data == storage.read_bytes(storage.join(storage_root, image["key"]))
        pixels = pymupdf.Pixmap(data)
        assert (pixels.width, pixels.height) == (image["width"], image["height"])
        assert AGENT.image_min_pixels <= pixels.width * pixels.height <= AGENT.image_max_pixels
    async with opened(storage_root, pages) as store:  # another run, or another machine
        assert await store.image("a.pdf", 1) == asked[0]
    assert len(jobs) == 2
    async with opened(storage_root, pages, agent=config.Agent(observation="image", image_dpi=20)) as store:
        other = await store.image("a.pdf", 1)
    assert other is not None
    assert other["key"] != asked[0]["key"]  # type: ignore[index]


async def test_a_server_can_read_an_image_by_its_address(storage_root: str, folder: Path) -> None:
    pages = read(storage_root, folder)
    async with opened(storage_root, pages, "url") as store:
        image = await store.image("below/b c.pdf", 3)
        assert image is not None
        url = (await store.url(image)).decode()
        assert await store.url(image) == url.encode()
    assert url.startswith("http" if storage.is_s3(storage_root) else "file:///")
    assert received(url) == storage.read_bytes(storage.join(storage_root, image["key"]))


async def test_documents_that_moved_are_found_where_they_were_ingested_last(tmp_path: Path, folder: Path) -> None:
    root = str(tmp_path / "storage")
    pages = read(root, folder)
    moved = folder.rename(tmp_path / "moved")
    async with opened(root, pages) as store:
        with pytest.raises(InputError, match=r"a\.pdf: .*nothing lies at .*pdfs/a\.pdf.*run ingest"):
            await store.image("a.pdf", 1)
        (folder).mkdir()
        shutil.copy(moved / "below" / "b c.pdf", folder / "a.pdf")
        with pytest.raises(InputError, match="is not what was ingested"):
            await store.image("a.pdf", 1)
    images.note_documents(root, str(moved))
    async with opened(root, pages) as store:
        assert await store.image("a.pdf", 1)
        assert await store.image("below/b c.pdf", 2)


async def test_documents_below_a_root_that_moved_are_found_in_it(tmp_path: Path, folder: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(folder, old / "input")
    refs.save_ref(str(old), "pages", read(str(old), old / "input"))
    images.note_documents(str(old), str(old / "input"))
    old.rename(new)
    async with opened(str(new), refs.load_ref(str(new), "pages")) as store:
        assert await store.image("below/b c.pdf", 2)


async def test_a_page_without_a_pdf_and_one_that_cannot_be_rendered_have_no_image(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = str(tmp_path / "storage")
    rows = artifact.read_rows(read(root, folder))
    rows[0] |= {"source_uri": None, "source_sha256": None}
    table = artifact.table_of(rows, "pages/2")
    pages = artifact.write_table(table, storage.join(root, "some.parquet"), "pages/2", {})
    async with opened(root, pages) as store:
        assert await store.image("a.pdf", 1) is None
        monkeypatch.setattr(images, "render_page", ends_its_process)
        ended, other = await asyncio.gather(store.image("below/b c.pdf", 1), store.image("below/b c.pdf", 2))
        monkeypatch.undo()
        assert (ended, other) == (None, None)
        assert await store.image("below/b c.pdf", 3)  # others are rendered all the same
    markers = [uri for uri in stored(root) if uri.endswith("/no-image")]
    assert len(markers) == 2
    assert {storage.read_bytes(uri) for uri in markers} == {b"its process ended, had too little memory, or took 60 s"}
    async with opened(root, pages) as store:  # another run does not try again what cost so much
        assert await store.image("below/b c.pdf", 1) is None
    storage.delete(markers[0])
    async with opened(root, pages) as store:
        assert await store.image("below/b c.pdf", 1)


async def test_too_little_memory_is_a_matter_of_the_moment(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = str(tmp_path / "storage")
    pages = read(root, folder)
    monkeypatch.setenv("SHORT_OF_MEMORY_ONCE", str(tmp_path / "was-short"))
    monkeypatch.setattr(images, "render_page", short_of_memory_once)
    async with opened(root, pages) as store:
        assert await store.image("a.pdf", 1)


def short_of_memory_once(*job: Any) -> str:
    """What renders, where at first there is too little memory."""
    try:
        Path(os.environ["SHORT_OF_MEMORY_ONCE"]).touch(exist_ok=False)
    except FileExistsError:
        return render_page(*job)
    raise MemoryError


async def test_many_pages_are_found_each_once_and_a_pdf_that_is_gone_is_told(tmp_path: Path, folder: Path) -> None:
    root, told = str(tmp_path / "storage"), list[tuple[int, int]]()
    pages = PageStore(read(root, folder))
    wanted = [(file, page) for file in ("below/b c.pdf", "a.pdf") for page in (3, 1, 2)]

    async def found() -> dict[tuple[str, int], Any]:
        return await images.images_of_all(root, pages, AGENT, wanted, lambda done, total: told.append((done, total)))

    made = await found()
    assert told == [(done, 6) for done in range(1, 7)]
    assert made.keys() == set(wanted)
    assert {(image["file"], image["page"]) for image in made.values()} == set(wanted)
    assert sorted(storage.join(root, image["key"]) for image in made.values()) == sorted(stored(root))
    shutil.rmtree(folder)
    assert await found() == made
    storage.delete(images.folder(root))
    with pytest.raises(InputError, match="run ingest"):
        await found()


def ends_its_process(*_: Any) -> str:
    """In place of what renders, as a PDF that crashes the library."""
    import os

    os._exit(1)


async def test_what_is_kept_in_memory_is_bounded(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = str(tmp_path / "storage")
    pages = read(root, folder)
    async with opened(root, pages) as store:
        found = [await store.image(file, page) for file in ("a.pdf", "below/b c.pdf") for page in (1, 2, 3)]
        most = 4 * max(image["width"] * image["height"] for image in found if image) // 100
        monkeypatch.setattr(images, "MOST_KEPT_BYTES", most)
        for image in found:
            assert image is not None
            assert base64.b64decode((await store.url(image)).partition(b",")[2])
        for image in reversed(found):
            assert image is not None
            await store.url(image)
            assert sum(len(url) for url, _ in store._urls.values()) == store._kept_bytes <= most
