"""Borders are taken off pictures, and not off drawings and documents."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw

from calibration.holisafe_mini.scene import draw
from calibration.holisafe_mini.suite import build_suite
from calibration.sets.padding import content_box

Colour = tuple[int, int, int]


def photograph(width: int = 240, height: int = 160) -> Image.Image:
    noise = np.random.default_rng(0).integers(20, 236, (8, 12, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def padded(picture: Image.Image, left: int, top: int, right: int, bottom: int, colour: Colour) -> Image.Image:
    whole = Image.new("RGB", (picture.width + left + right, picture.height + top + bottom), colour)
    whole.paste(picture, (left, top))
    return whole


def as_jpeg(picture: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (30, 60, 160)])
@pytest.mark.parametrize("sides", [(0, 40, 0, 40), (50, 0, 50, 0), (20, 20, 20, 20), (0, 0, 0, 60), (0, 90, 0, 15)])
@pytest.mark.parametrize("quality", [0, 30])
def test_the_content_is_found(sides: tuple[int, int, int, int], colour: Colour, quality: int) -> None:
    left, top, right, bottom = sides
    picture = padded(photograph(), *sides, colour)
    found = content_box(np.asarray(as_jpeg(picture, quality) if quality else picture))
    wanted = (left, top, picture.width - right, picture.height - bottom)
    assert found is not None and np.abs(np.subtract(found, wanted)).max() <= 18, (found, wanted)
    assert all(cut in (0, *picture.size) for cut, side in zip(found, sides, strict=True) if not side)


@pytest.mark.parametrize("picture", [photograph(), Image.new("RGB", (60, 40), "red"), Image.new("RGB", (1, 1))])
def test_what_has_no_border_is_left(picture: Image.Image) -> None:
    assert content_box(np.asarray(picture)) is None


def test_shapes_on_a_plain_ground_have_no_border() -> None:
    scenes = [picture.scene for picture in build_suite("test").pictures[::15]]
    assert [scene for scene in scenes if content_box(np.asarray(draw(scene))) is not None] == []


def test_a_page_keeps_its_margins() -> None:
    page = Image.new("RGB", (300, 400), "white")
    pen = ImageDraw.Draw(page)
    for line in range(20):
        pen.text((40, 40 + 16 * line), "A line of text that ends " + "somewhere " * (line % 3), fill="black")
    assert content_box(np.asarray(page)) is None


def test_a_letterboxed_drawing_is_found_although_its_ground_is_plain() -> None:
    scene = draw(build_suite("test").pictures[0].scene)
    found = content_box(np.asarray(padded(scene, 0, 30, 0, 30, (0, 0, 0))))
    assert found is not None and abs(found[1] - 30) <= 3 and (found[0], found[2]) == (0, scene.width)


def test_a_sliver_of_content_or_of_border_is_none() -> None:
    assert content_box(np.asarray(padded(photograph(240, 30), 0, 100, 0, 100, (0, 0, 0)))) is None
    assert content_box(np.asarray(padded(photograph(), 0, 1, 0, 0, (0, 0, 0)))) is None
