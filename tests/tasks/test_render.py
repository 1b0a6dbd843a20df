"""A page of a real PDF becomes an image of the size that the settings say, whatever the page."""

import math
from pathlib import Path

import pymupdf
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tasks.render import Rendering, encodings, size_of

USUAL = Rendering(dpi=200, min_pixels=256 * 28 * 28, max_pixels=1280 * 28 * 28, max_bytes=3 * 1024 * 1024)
SIDES = st.floats(0.01, 50_000)


@given(SIDES, SIDES, st.integers(10, 1200), st.integers(1, 10**6), st.integers(1, 64))
def test_size_keeps_pixels_and_proportion(width: float, height: float, dpi: int, most: int, share: int) -> None:
    rendering = Rendering(dpi, most // share, most, 10**6)
    size = size_of(width, height, rendering)
    if max(width, height) > 200 * min(width, height):
        assert size is None
        return
    if size is None:  # a line once it is rounded, though its page is none
        assert max(width, height) > 90 * min(width, height)
        return
    across, down = size
    assert max(size) <= 200 * min(size)
    assume(min(size) >= 20)  # where a whole pixel is little
    assert across * down <= most
    assert across * down >= 0.9 * rendering.min_pixels
    assert math.isclose(across / down, width / height, rel_tol=0.1)


def test_a_letter_page_at_200_dpi() -> None:
    assert size_of(612, 792, USUAL) == (880, 1139)
    assert size_of(612, 792, Rendering(200, 1, 10**8, 1)) == (1700, 2200)
    assert size_of(0, 792, USUAL) is None
    assert size_of(2, 299, Rendering(72, 1, 10**6, 1)) == (2, 299)
    assert size_of(1.5, 299, Rendering(72, 1, 10**6, 1)) is None  # 1 × 299 once it is rounded


@settings(max_examples=25, deadline=None)
@given(st.floats(20, 3000), st.floats(20, 3000), st.sampled_from([0, 90, 180, 270]), st.floats(0, 15))
def test_the_image_has_that_size_also_of_pages_that_are_turned_or_cut(
    width: float, height: float, turned: int, cut: float
) -> None:
    page = pymupdf.open().new_page(width=width, height=height)
    page.insert_text((5, 15), "A page.")
    page.set_rotation(turned)
    page.set_cropbox(pymupdf.Rect(cut, 0, page.cropbox.x1, page.cropbox.y1))
    size = size_of(page.rect.width, page.rect.height, USUAL)
    made = next(encodings(page, USUAL), None)
    if size is None:  # cut to a mere line
        assert made is None
        return
    assert made is not None
    data, suffix, across, down = made
    pixels = pymupdf.Pixmap(data)
    assert (pixels.width, pixels.height) == (across, down) == size
    assert data.startswith(b"\x89PNG" if suffix == "png" else b"\xff\xd8\xff")


@pytest.fixture(scope="module")
def photograph() -> pymupdf.Page:
    """A page of noise, of which no small image can be made."""
    import random

    noise = pymupdf.Pixmap(pymupdf.csRGB, 800, 600, random.Random(0).randbytes(800 * 600 * 3), False)
    page = pymupdf.open().new_page(width=400, height=300)
    page.insert_image(page.rect, pixmap=noise)
    return page


def test_the_smaller_of_png_and_jpeg_and_less_quality_where_that_is_too_much(photograph: pymupdf.Page) -> None:
    drawn = pymupdf.open().new_page()
    drawn.insert_text((72, 72), "Words alone.")
    assert next(encodings(drawn, USUAL))[1] == "png"
    made = list(encodings(photograph, USUAL))
    assert made[0][1] == "jpg"
    sizes = [len(data) for data, *_, down in made if down == made[0][3]]
    assert len(sizes) > 2
    assert sizes == sorted(sizes, reverse=True)
    assert len(made[-1][0]) < len(made[0][0]) / 100


def test_pages_of_the_sample_are_legible(tmp_path: Path) -> None:
    """What is small in print is still print: dark strokes on white, not one grey."""
    document = pymupdf.open()
    page = document.new_page()
    page.insert_text((72, 72), "illegible", fontsize=8)
    data = next(encodings(page, USUAL))[0]
    grey = pymupdf.Pixmap(pymupdf.csGRAY, pymupdf.Pixmap(data))
    assert min(grey.samples) < 100
