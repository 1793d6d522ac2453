"""The file of an image that goes upstream: written from what is shown, with nothing of the client's file in it.

A PNG is exact, with a palette or in grey where its colours allow. Where that would be much larger than the file that
came, and for what was lossy from the start, it is a JPEG. What the guard judges is read from these very bytes.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

__all__ = ["Encoded", "encode", "stated_quality"]

GROWTH = 1.5
"""What is sent on has at most so many times the bytes of what came,"""
FLOOR = 4096
"""or so many bytes, which the smallest files need."""
QUALITIES = (95, 90, 85, 75, 60, 45, 30, 15, 5)
"""Of JPEG; the first that fits is taken."""
FULL_COLOUR = 90
"""From this quality on colours are not subsampled."""
LUMINANCE = 3685
"""Sum of the luminance table at quality 50 (JPEG, annex K)."""
COLOURS = 256
LEAST_SIDE = 16


@dataclass(frozen=True)
class Encoded:
    """The bytes of a file and its media type."""

    content: bytes
    kind: str


def encode(image: Image.Image, came: int, *, lossy: int | None) -> Encoded:
    """Write an RGB image that came as a file of ``came`` bytes.

    ``lossy`` is the JPEG quality of that file, None where it was exact.
    """
    most = max(FLOOR, int(GROWTH * came))
    image = Image.fromarray(np.asarray(image))  # without what Pillow remembers of the file: profile, comment, …
    if lossy is None:
        for level in (1, 6):
            content = _png(image, level)
            if len(content) <= most:
                return Encoded(content, "image/png")
    return Encoded(_jpeg(image, most, QUALITIES[0] if lossy is None else lossy), "image/jpeg")


def stated_quality(tables: object) -> int:
    """Return the quality that a JPEG's quantization tables are those of, as libjpeg counts it, 1 to 95."""
    if not isinstance(tables, dict) or not tables:
        return QUALITIES[0]
    luminance = next(iter(tables.values()))
    scale = max(1.0, 100 * sum(luminance) / LUMINANCE)
    quality = (200 - scale) / 2 if scale <= 100 else 5000 / scale
    return int(min(QUALITIES[0], max(1, round(quality))))


def _jpeg(image: Image.Image, most: int, best: int) -> bytes:
    while True:
        for quality in (best, *(each for each in QUALITIES if each < best)):
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=quality, subsampling=0 if quality >= FULL_COLOUR else 2)
            if buffer.tell() <= most or max(image.size) <= LEAST_SIDE:
                return buffer.getvalue()
        image = image.resize((max(1, image.width // 2), max(1, image.height // 2)), Image.Resampling.BOX)


def _png(image: Image.Image, level: int) -> bytes:
    buffer = io.BytesIO()
    _plainest(image).save(buffer, "PNG", compress_level=level)
    return buffer.getvalue()


def _plainest(image: Image.Image) -> Image.Image:
    """Return the same image in grey or with a palette, if it can be."""
    colours = image.getcolors(COLOURS)
    if colours is None:
        red, green, blue = image.split()
        return red if red.tobytes() == green.tobytes() == blue.tobytes() else image
    palette = np.array([colour for _, colour in colours], dtype=np.int64)
    if (palette == palette[:, :1]).all():
        return image.getchannel("R")
    palette = palette[np.argsort(_keys(palette))]
    places = np.searchsorted(_keys(palette), _keys(np.asarray(image, dtype=np.int64)))
    paletted = Image.fromarray(places.astype(np.uint8))
    paletted.putpalette(palette.astype(np.uint8).tobytes())
    return paletted


def _keys(rgb: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    keys: npt.NDArray[np.int64] = (rgb << np.array([16, 8, 0])).sum(axis=-1)
    return keys
