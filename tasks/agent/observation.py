"""What the model sees of a search's results: the pages' images, their text, both, or only their names."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from tasks.agent.message import PLACEHOLDER, Image, without_placeholders
from tasks.agent.trajectory import SearchRecord
from tasks.config import Agent
from tasks.errors import ConfigError

PageText = Callable[[str, int], str]
"""(file, page number from 1) → the page's text."""

PageImage = Callable[[str, int], Awaitable[Image | None]]
"""(file, page number from 1) → the page's image; None where there is none."""


@dataclass(frozen=True, slots=True)
class Observation:
    """What the model is shown of a search."""

    text: str  # each image stands in it as a placeholder
    images: tuple[Image, ...] = ()
    missing: int = 0  # pages that have no image, and are shown by their text


async def observe(
    search: SearchRecord, settings: Agent, page_text: PageText, page_image: PageImage | None
) -> Observation:
    """A search's results as the model reads them, best first: each page's name, then its image, then its text.

    Raises:
        ConfigError: images are to be shown, and there is nothing that gives them.
    """
    images: Sequence[Image | None] = [None] * len(search.results)
    if settings.sees_images:
        if page_image is None:
            raise ConfigError(f"observation {settings.observation!r} needs page images, which are not to be had here")
        images = await asyncio.gather(*(page_image(file, page) for _, file, page, _ in search.results))
    return as_read(search, settings, page_text, images)


def as_read(search: SearchRecord, settings: Agent, page_text: PageText, images: Sequence[Image | None]) -> Observation:
    """A search's results as the model reads them, given an image or None for each."""
    pages = [
        f"[{rank}] {without_placeholders(file)} page {page}" + _shown(image, page_text, file, page, settings)
        for (rank, file, page, _), image in zip(search.results, images, strict=True)
    ]
    shown = tuple(image for image in images if image is not None)
    return Observation(
        text="\n".join(["<results>", *_note(search), *pages, "</results>"]),
        images=shown,
        missing=len(images) - len(shown) if settings.sees_images else 0,
    )


def as_text(text: str, settings: Agent) -> str:
    """A page's text as the model sees it, cut to `max_page_chars`."""
    return without_placeholders(text)[: settings.max_page_chars].strip()


def _shown(image: Image | None, page_text: PageText, file: str, page: int, settings: Agent) -> str:
    if settings.observation == "none":
        return ""
    picture = "" if image is None else f"\n{PLACEHOLDER}"
    if image is not None and settings.observation == "image":
        return picture
    return f"{picture}\n{as_text(page_text(file, page), settings)}"


def _note(search: SearchRecord) -> list[str]:
    if not search.results:
        return ["No page was found. Use other words, or fewer."]
    if search.read_as == "words":
        return ["The query could not be read as one and was searched as plain words."]
    return []
