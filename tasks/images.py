"""Page images: rendered once, kept below the storage root for all machines, and given to servers in the form they take.

    <root>/page-images/<PDF's hash>/<settings' hash>/<page>/843x1192.png
    <root>/page-images/imported/<its hash>.png                              what `drag import` brought

A key is that path below the root. A page that cannot be rendered has a file `no-image` there instead, which says why. Two
machines that want a page at the same moment both render it, to the same bytes.
"""

import asyncio
import base64
import json
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from tasks import storage
from tasks.agent.message import Image
from tasks.config import Agent
from tasks.errors import ArtifactError
from tasks.logs import run_logger
from tasks.pages import PageStore
from tasks.processes import cores, new_pool
from tasks.render import CPU_LIMIT_S, Rendering, Unrenderable, render_page
from tasks.source import source_of

MOST_KEPT_BYTES = 256 * 1024 * 1024
"""Images kept in memory as they are sent, the ones that were wanted last."""

_FOLDER = "page-images"
_NONE = "no-image"  # lies in place of the image of a page that cannot be rendered, which is found out but once
_TYPES = {".png": "image/png", ".jpg": "image/jpeg"}
_SIGNED_FOR_S = 6 * 3600  # longer than a rollout may sensibly take
_SIGN_AGAIN_S = 3600.0

T = TypeVar("T")


def folder(root: str) -> str:
    """Where a storage root's page images lie."""
    return storage.join(root, _FOLDER)


def imported(name: str) -> str:
    """The key of an image that was not rendered here, which nothing takes for a page's own."""
    return f"{_FOLDER}/imported/{name}"


def note_documents(root: str, documents: str) -> None:
    """Note where the documents lie now: pages that were read before they moved know only where they were."""
    storage.write_bytes(_note(root), json.dumps({"documents": storage.portable(documents, root)}).encode())


def _note(root: str) -> str:
    return storage.join(folder(root), "documents.json")


def _documents(root: str) -> str | None:
    try:
        return storage.located(json.loads(storage.read_bytes(_note(root)))["documents"], root)
    except ArtifactError:
        return None  # ingested without PDFs, or not by `ingest`


class PageImages:
    """The images of some pages under one rendering, for as long as the block runs.

    Whatever takes time (rendering, reading, encoding) happens in other processes and threads, once however many rollouts ask.
    """

    def __init__(self, root: str, pages: PageStore, agent: Agent, send: Literal["inline", "url"]) -> None:
        self._root, self._pages, self._rendering, self._send = root, pages, Rendering.of(agent), send
        self._images: dict[Hashable, asyncio.Task[Image | None]] = {}
        self._loading: dict[Hashable, asyncio.Task[bytes]] = {}
        self._urls: OrderedDict[str, tuple[bytes, float]] = OrderedDict()  # key → URL, good until
        self._kept_bytes = 0
        self._documents: str | None = None
        self._renderers = _Renderers()

    async def __aenter__(self) -> Self:
        self._documents = await asyncio.to_thread(_documents, self._root)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        tasks = [*self._images.values(), *self._loading.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(self._renderers.close)

    async def image(self, file: str, page: int) -> Image | None:
        """The page's image, rendered if nobody ever did; None for a page without a PDF, or that cannot be rendered.

        Raises:
            InputError: the PDF is not where it was, or is another; the message names it.
            ArtifactError: there is no such document.
            StorageError, ConfigError: the storage does not answer.
        """
        return await _once(self._images, (file, page), lambda: self._found(file, page), keep=True)

    async def _found(self, file: str, page: int) -> Image | None:
        uri, sha256 = self._pages.source(file), self._pages.source_sha256(file)
        if uri is None or sha256 is None:
            return None
        place = storage.join(folder(self._root), sha256[:32], self._rendering.fingerprint, str(page))
        name = await asyncio.to_thread(_image_in, place)
        if name is None:
            source = source_of(file, uri, sha256, self._documents)
            try:
                name = await self._renderers.run(source, page, self._rendering, place)
            except Unrenderable as error:
                name = _NONE
                await asyncio.to_thread(storage.write_bytes, storage.join(place, _NONE), str(error).encode())
        if name == _NONE:
            marker = storage.join(place, _NONE)
            why = (await asyncio.to_thread(storage.read_bytes, marker)).decode()
            said = "%s, page %d, cannot be rendered (%s) and is shown by its text; without %s it is tried again"
            run_logger().warning(said, file, page, why, marker)
            return None
        width, height = map(int, PurePosixPath(name).stem.split("x"))
        return Image(
            file=file,
            page=page,
            key=storage.relative(storage.join(place, name), self._root),
            width=width,
            height=height,
        )

    async def url(self, image: Image) -> bytes:
        """The address that a server gets an image by, in ASCII: a data URL, or a file or signed https URL.

        Raises:
            ArtifactError: the stored image has gone.
            StorageError, ConfigError: the storage does not answer.
        """
        key, now = image["key"], asyncio.get_running_loop().time()
        kept = self._urls.get(key)
        if kept is not None and kept[1] > now:
            self._urls.move_to_end(key)
            return kept[0]
        return await _once(self._loading, key, lambda: self._load(key), keep=False)

    async def _load(self, key: str) -> bytes:
        uri = storage.join(self._root, key)
        make = _data_url if self._send == "inline" else _address
        url = await asyncio.to_thread(make, uri)
        now = asyncio.get_running_loop().time()
        self._kept_bytes -= len(self._urls.pop(key, (b"", 0.0))[0])
        self._urls[key] = url, now + (float("inf") if self._send == "inline" else _SIGN_AGAIN_S)
        self._kept_bytes += len(url)
        while self._kept_bytes > MOST_KEPT_BYTES and len(self._urls) > 1:
            self._kept_bytes -= len(self._urls.popitem(last=False)[1][0])
        return url


async def images_of_all(
    root: str,
    pages: PageStore,
    agent: Agent,
    wanted: Iterable[tuple[str, int]],
    on_progress: Callable[[int, int], None],
) -> dict[tuple[str, int], Image | None]:
    """The images of many pages, each as `PageImages.image` finds it, side by side.

    Args:
        wanted: (file, page number from 1) of each.
        on_progress: is called with (pages done, pages wanted) after each one.
    """
    found: dict[tuple[str, int], Image | None] = dict.fromkeys(sorted(wanted))  # a document's pages one after the other
    done = 0

    async def find(file: str, page: int) -> None:
        nonlocal done
        found[file, page] = await images.image(file, page)
        done += 1
        on_progress(done, len(found))

    async with PageImages(root, pages, agent, "inline") as images:
        await asyncio.gather(*(find(*page) for page in found))
    return found


async def _once(
    running: dict[Hashable, asyncio.Task[T]], key: Hashable, make: Callable[[], Awaitable[T]], *, keep: bool
) -> T:
    """What `make` gives, made once for all who ask meanwhile, or ever where it is to be kept. A failure is not kept."""

    async def made() -> T:
        return await make()

    if key not in running:
        task = running[key] = asyncio.create_task(made())
        task.add_done_callback(lambda t: running.pop(key) if not keep or t.cancelled() or t.exception() else None)
    return await asyncio.shield(running[key])  # whoever is cancelled takes it from nobody else


def _image_in(place: str) -> str | None:
    """The name of the image in a page's folder, or `_NONE`; None where the page was not rendered yet."""
    names = [storage.relative(uri, place) for uri in storage.iter_files(place)]
    return next((name for name in names if PurePosixPath(name).suffix in _TYPES), _NONE if _NONE in names else None)


def _data_url(uri: str) -> bytes:
    head = f"data:{_TYPES[PurePosixPath(uri).suffix]};base64,"
    return head.encode() + base64.b64encode(storage.read_bytes(uri))


def _address(uri: str) -> bytes:
    if storage.is_s3(uri):
        return storage.signed_url(uri, _SIGNED_FOR_S).encode()
    return Path(uri).as_uri().encode()


class _Renderers:
    """Processes that render. A page that ends its process is found out."""

    def __init__(self) -> None:
        self._workers = cores()
        self._pool: ProcessPoolExecutor | None = None
        self._at_once = asyncio.Semaphore(self._workers)
        self._alone = asyncio.Lock()

    async def run(self, *job: Any) -> str:
        """`render_page(*job)` in a process of a pool, and once more, by itself, where that ended or had too little memory.

        Raises:
            as `render_page`, but for MemoryError.
        """
        async with self._at_once:
            try:
                pool = self._pool = self._pool or new_pool(self._workers)
                return await asyncio.wrap_future(pool.submit(render_page, *job))
            except MemoryError:
                pass
            except BrokenProcessPool:  # a dying process takes the pool with it, and all that was under way
                if self._pool is pool:
                    self._pool = None
        async with self._alone:
            pool = new_pool(1)
            try:
                return await asyncio.wrap_future(pool.submit(render_page, *job))
            except (MemoryError, BrokenProcessPool) as error:
                took = f"its process ended, had too little memory, or took {CPU_LIMIT_S:.0f} s"
                raise Unrenderable(took) from error
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
