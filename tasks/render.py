"""One page of a PDF → its image, in a process of its own: whatever the file does to the renderer stays there."""

import functools
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from tasks import storage
from tasks.config import Agent
from tasks.pdf import open_pdf
from tasks.processes import cpu_limit
from tasks.source import Source, read_source

CPU_LIMIT_S = 60.0
"""A page that keeps a core busy for longer cannot be rendered; most take a tenth of a second."""

MOST_UNEQUAL = 200
"""Qwen's image processor refuses an image whose one side is more than so many times the other."""

_METHOD = 1  # raised when the same settings are to give other images
_QUALITIES = (90, 75, 60, 45, 30)


class Unrenderable(Exception):
    """There can be no image of a page; the message says why."""


@dataclass(frozen=True)
class Rendering:
    """The settings that decide what a page's image looks like."""

    dpi: int
    min_pixels: int
    max_pixels: int
    max_bytes: int

    @classmethod
    def of(cls, agent: Agent) -> "Rendering":
        return cls(agent.image_dpi, agent.image_min_pixels, agent.image_max_pixels, agent.image_max_bytes)

    @property
    def fingerprint(self) -> str:
        content = json.dumps([_METHOD, *asdict(self).values()])
        return hashlib.sha256(content.encode()).hexdigest()[:12]


def size_of(width: float, height: float, rendering: Rendering) -> tuple[int, int] | None:
    """Width and height in pixels of a page's image; None for a page that is no picture: without area, or a mere line.

    As `dpi` says, made smaller to at most `max_pixels` and larger to at least `min_pixels`, the sides kept in proportion.

    Args:
        width, height: of the page, in points of 1/72 inch.
    """
    if not (0 < width < math.inf and 0 < height < math.inf) or _is_line(width, height):
        return None
    scale = rendering.dpi / 72
    pixels = width * height * scale**2
    wanted = min(max(pixels, rendering.min_pixels), rendering.max_pixels)
    scale *= math.sqrt(wanted / pixels)
    across, down = max(1, math.floor(width * scale)), max(1, math.floor(height * scale))
    if across * down < rendering.min_pixels:  # rounded down too far
        across, down = math.ceil(width * scale), math.ceil(height * scale)
        if across * down > rendering.max_pixels:  # a range too narrow for whole pixels
            across, down = max(1, math.floor(width * scale)), max(1, math.floor(height * scale))
    return None if _is_line(across, down) else (across, down)  # rounding may have made it one


def _is_line(width: float, height: float) -> bool:
    return max(width, height) > MOST_UNEQUAL * min(width, height)


def encodings(page: Any, rendering: Rendering) -> Iterator[tuple[bytes, str, int, int]]:
    """Ever plainer images of a page of PyMuPDF: (bytes, "png" or "jpg", width, height in pixels).

    First the smaller of a PNG and a good JPEG, then JPEGs of less quality, then half of the pixels, and so on.
    """
    import pymupdf

    size = size_of(page.rect.width, page.rect.height, rendering)
    while size is not None and min(size) >= 1 and not _is_line(*size):
        across, down = size
        scaled = pymupdf.Matrix(across / page.rect.width, down / page.rect.height)
        pixels = page.get_pixmap(matrix=scaled, alpha=False, colorspace=pymupdf.csRGB)
        if (pixels.width, pixels.height) != size:  # a rounding at the page's edge
            pixels = pymupdf.Pixmap(pixels, across, down)
        jpegs = (pixels.tobytes("jpeg", jpg_quality=quality) for quality in _QUALITIES)
        png, jpeg = pixels.tobytes("png"), next(jpegs)
        yield (png, "png", across, down) if len(png) <= len(jpeg) else (jpeg, "jpg", across, down)
        yield from ((jpeg, "jpg", across, down) for jpeg in jpegs)
        size = math.floor(across * math.sqrt(0.5)), math.floor(down * math.sqrt(0.5))


def render_page(source: Source, number: int, rendering: Rendering, folder: str) -> str:
    """Render a page and store its image below `folder`, named by its size; returns its name, such as "843x1192.png".

    To be called in the main thread of a process of its own: a page that takes more than `CPU_LIMIT_S` ends that process.

    Raises:
        Unrenderable: the fault lies in the page.
        MemoryError: there was too little for it, at that moment.
        InputError: the PDF is not where it was, or is another.
        StorageError, ConfigError: the storage does not answer.
    """
    document = _open(source)
    try:
        with cpu_limit(CPU_LIMIT_S):
            made = encodings(document[number - 1], rendering)
            found = next((e for e in made if len(e[0]) <= rendering.max_bytes), None)
    except MemoryError:
        raise
    except Exception as error:  # the library has no common base, and the fault lies in the file
        raise Unrenderable(f"{type(error).__name__}: {error}") from error
    if found is None:
        raise Unrenderable(f"it is a mere line, or no image of it is as small as {rendering.max_bytes} bytes")
    data, suffix, across, down = found
    name = f"{across}x{down}.{suffix}"
    storage.write_bytes(storage.join(folder, name), data)
    return name


@functools.lru_cache(maxsize=2)
def _open(source: Source) -> Any:
    """The document, kept open as its other pages are likely to be asked for."""
    return open_pdf(read_source(source))
