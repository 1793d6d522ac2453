"""Find an image again among many after it was saved anew, resized, brightened a little or cropped a little.

Two images are the same if their pixels are, or if one of two comparisons says so. Both look at ``FINE`` × ``FINE``
thumbnails, both sides squashed to a square, and at the centre squares of what is not square.

- *Brightness and contrast apart*, their correlation is at least ``SAME``. Re-encoding and resizing keep it
  above 0.98, and typed pages with other words stay below.
- *After cutting up to ``MAX_CROP`` from each side* of one of them, colours differ by ``MAX_RMS`` levels of 255 at most
  (root mean square), and by ``MAX_RELATIVE`` of the contrast. Brightness counts here: shapes on a plain ground, moved
  and scaled, differ in little else.

The bounds were measured on holisafe-mini, whose drawn images resemble each other more than photographs do, on
photographs and on typed pages. Not found are images mirrored, turned, recoloured, padded, cropped further or
put into others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["Match", "PictureIndex", "pixels_sha256"]

COARSE = 16
FINE = 64
CROPPED = 32
"""Sides of the thumbnails that are searched, that are compared, and that cuts are compared at, in pixels."""
CANDIDATE = 0.8
"""Correlation of coarse thumbnails from which images are compared at all."""
SAME = 0.98
MAX_CROP = 0.06
CROP_STEPS = (0.04, 0.02, 0.01, 0.005)
MAX_RMS = 3.2
MAX_RELATIVE = 0.08
FLATTEST = 2.0
"""Contrast (standard deviation, levels of 255) below which an image resembles none but its own pixels."""
SQUARE = 1.05
"""Ratio of sides up to which an image counts as square."""

Floats = NDArray[np.float32]
Sides = tuple[float, float, float, float]
"""What is cut off left, above, right and below, as shares of width and height."""


@dataclass(frozen=True)
class Match:
    """The item found, by its number, and how: ``pixels`` (identical) or ``picture`` (alike)."""

    item: int
    signal: str
    detail: str


@dataclass(frozen=True)
class _View:
    coarse: Floats
    fine: Image.Image


def pixels_sha256(picture: Image.Image) -> str:
    """Return the SHA-256 of an RGB image's size and pixels: the same for every lossless file of it."""
    width, height = picture.size
    return hashlib.sha256(f"{width}x{height}:".encode() + picture.tobytes()).hexdigest()


class PictureIndex:
    """Pictures to be found again; items are numbered from 0 in the order given."""

    def __init__(self, pictures: Iterable[Image.Image]) -> None:
        self._first: dict[str, int] = {}
        self._items: list[int] = []
        self._fine: list[Image.Image] = []
        coarse: list[Floats] = []
        for item, picture in enumerate(pictures):
            self._first.setdefault(pixels_sha256(picture), item)
            for view in _views(picture):
                self._items.append(item)
                self._fine.append(view.fine)
                coarse.append(view.coarse)
        self._coarse = np.stack(coarse) if coarse else np.zeros((0, COARSE * COARSE * 3), np.float32)

    def __len__(self) -> int:
        return len(self._first)

    def find(self, picture: Image.Image) -> Match | None:
        """Return the likest item that is the same image, or ``None``."""
        identical = self._first.get(pixels_sha256(picture))
        if identical is not None:
            return Match(identical, "pixels", "identical pixels")
        for view in _views(picture):
            alike = self._coarse @ view.coarse
            for number in np.argsort(-alike, kind="stable"):
                if alike[number] < CANDIDATE:
                    break
                detail = _compare(self._fine[number], view.fine)
                if detail is not None:
                    return Match(self._items[number], "picture", detail)
        return None


def _views(picture: Image.Image) -> Iterator[_View]:
    """Yield an image squashed to a square and, if that changes it, its centre square."""
    width, height = picture.size
    side = min(width, height)
    boxes = [(0.0, 0.0, float(width), float(height))]
    if max(width, height) > SQUARE * side:
        left, top = (width - side) / 2, (height - side) / 2
        boxes.append((left, top, left + side, top + side))
    for box in boxes:
        # BILINEAR weighs like a tent over all source pixels; BOX leaves steps at sizes that do not divide
        fine = picture.resize((FINE, FINE), Image.Resampling.BILINEAR, box=box)
        coarse = picture.resize((COARSE, COARSE), Image.Resampling.BILINEAR, box=box)
        yield _View(_standardised(coarse), fine)


def _pixels(picture: Image.Image) -> Floats:
    return np.asarray(picture, dtype=np.float32).reshape(-1)


def _standardised(picture: Image.Image) -> Floats:
    """Return pixels with mean 0 and norm 1 (less for a flat image), so that a dot product is a correlation."""
    pixels = _pixels(picture) - np.float32(_pixels(picture).mean())
    scale: Any = max(float(pixels.std()), FLATTEST) * np.sqrt(pixels.size)
    return np.asarray(pixels / np.float32(scale), dtype=np.float32)


def _compare(one: Image.Image, other: Image.Image) -> str | None:
    """Say in which way two fine thumbnails show the same image, or return ``None``."""
    correlation = float(_standardised(one) @ _standardised(other))
    if correlation >= SAME:
        return f"correlation {correlation:.4f}"
    contrast = min(float(_pixels(one).std()), float(_pixels(other).std()))
    bound = min(MAX_RMS, MAX_RELATIVE * contrast) if contrast >= FLATTEST else 0.0
    for whole, part in ((one, other), (other, one)):
        rms = _after_crop(whole, part)
        if rms <= bound:
            return f"cropped, colours within {rms:.1f} of 255"
    return None


def _after_crop(whole: Image.Image, part: Image.Image) -> float:
    """Return the root mean square difference at the cut of ``whole`` that is likest ``part``, by descent."""
    target = _pixels(_cut(part, (0, 0, 0, 0)))

    def difference(sides: Sides) -> float:
        return float(np.sqrt(np.mean((_pixels(_cut(whole, sides)) - target) ** 2)))

    sides: Sides = (0, 0, 0, 0)
    best = difference(sides)
    for step in CROP_STEPS:
        while True:
            found, cut = min((difference(cut), cut) for cut in _neighbours(sides, step))
            if found >= best:
                break
            best, sides = found, cut
    return best


def _neighbours(sides: Sides, step: float) -> Iterator[Sides]:
    for place in range(4):
        for change in (step, -step):
            moved = list(sides)
            moved[place] = round(min(max(moved[place] + change, 0.0), MAX_CROP), 4)
            yield moved[0], moved[1], moved[2], moved[3]


def _cut(picture: Image.Image, sides: Sides) -> Image.Image:
    width, height = picture.size
    box = (sides[0] * width, sides[1] * height, (1 - sides[2]) * width, (1 - sides[3]) * height)
    return picture.resize((CROPPED, CROPPED), Image.Resampling.BILINEAR, box=box)
