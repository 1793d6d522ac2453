"""What goes upstream of an image: a PNG or JPEG of the pixels alone, little larger than the file that came.

Nothing of the client's file is left but its pixels: no profile, no gamma, no transparency, no text. A JPEG is written
at the quality of the one that came, 95 at most, without subsampling: readers differ in how they scale colours up. What
has no loss stays a PNG, in as few bits as hold it exactly. Where that takes more than one and a half times the bytes
that came, JPEG's quality is lowered and then the size: what is judged is what has been written, read again.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageChops, ImageFile, JpegImagePlugin

from safevlm.images.image import open_image

__all__ = ["MOST_GROWTH", "ALWAYS_ALLOWED_BYTES", "Encoded", "encode"]

MOST_GROWTH = 1.5
ALWAYS_ALLOWED_BYTES = 1024
"""Bytes that every image may have, because headers and tables alone take some."""
BEST, WORST, STEP = 95, 20, 10
"""JPEG qualities: a higher one costs bytes without a visible gain; an image that would need a lower one is shrunk."""
JPEG_SIDE = 65_500
"""libjpeg's JPEG_MAX_DIMENSION."""
SHRUNK = 0.75
OPTIMISED = 4_000_000
"""Pixels of a JPEG with codes of its own, which are some hundredths shorter; libjpeg holds all of it for that."""
STRIP = 1 << 20
"""Pixels that are looked up at once."""
EFFORTS = (1, 6)
"""zlib's levels: the first is several times as fast."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """A file, its media type, and the RGB image that it holds."""

    content: bytes
    kind: str
    image: Image.Image


def encode(image: Image.Image, original: bytes) -> Encoded:
    """Write an RGB image that was read from the bytes of a file."""
    most = max(ALWAYS_ALLOWED_BYTES, int(len(original) * MOST_GROWTH))
    quality = _quality(original)
    plain = _plain(image)
    if quality is None:
        for effort in EFFORTS:
            content = _png(plain, effort)
            if len(content) <= most:
                return _read(content, "image/png", image.size)
        quality = BEST
    while True:
        if max(plain.size) <= JPEG_SIDE:
            content = _jpeg(plain, quality)
            if len(content) <= most or plain.size == (1, 1):
                return _read(content, "image/jpeg", plain.size)
            if quality > WORST:
                quality = max(WORST, quality - STEP)
                continue
        plain = plain.resize((max(1, int(plain.width * SHRUNK)), max(1, int(plain.height * SHRUNK))))


def _read(content: bytes, kind: str, size: tuple[int, int]) -> Encoded:
    return Encoded(content, kind, open_image(content, max_pixels=size[0] * size[1]))


def _plain(image: Image.Image) -> Image.Image:
    """Return an image without anything that belongs to its file, in grey where it is grey."""
    red, green, blue = image.split()
    is_grey = all(ImageChops.difference(red, other).getbbox() is None for other in (green, blue))
    plain = red if is_grey else Image.merge("RGB", (red, green, blue))
    plain.info = {}  # Pillow takes it along, and writes some of it
    return plain


# -- PNG ----------------------------------------------------------------------------------------------------


def _png(image: Image.Image, effort: int) -> bytes:
    few = _colours(image)
    buffer = io.BytesIO()
    (image if few is None else _indexed(image, few)).save(buffer, "PNG", compress_level=effort)
    return buffer.getvalue()


def _indexed(image: Image.Image, colours: list[int]) -> Image.Image:
    """Return an image of few colours, packed red first, as indices into a palette of just these."""
    table = np.array(sorted(colours), np.uint32)
    if image.mode == "L":
        indexed = image.point(np.searchsorted(table & 255, np.arange(256)).clip(0, len(table) - 1).tolist())
        indexed = Image.frombytes("P", image.size, indexed.tobytes())
    else:
        indexed = Image.new("P", image.size)
        for top in range(0, image.height, rows := max(1, STRIP // image.width)):
            levels = np.asarray(image.crop((0, top, image.width, min(top + rows, image.height)))).astype(np.uint32)
            packed = levels[..., 0] << 16 | levels[..., 1] << 8 | levels[..., 2]
            indexed.paste(Image.fromarray(np.searchsorted(table, packed).astype(np.uint8)), (0, top))
    indexed.putpalette(np.stack([table >> 16, table >> 8 & 255, table & 255], axis=1).astype(np.uint8).tobytes())
    return indexed


def _colours(image: Image.Image) -> list[int] | None:
    """Return the colours of an image, packed red first, None where an index into them would save nothing."""
    if image.mode == "L":
        levels = [level for level, count in enumerate(image.histogram()) if count]
        return [level * 0x010101 for level in levels] if len(levels) <= 16 else None
    found = image.getcolors(256)
    if found is None:
        return None
    packed: list[int] = (np.array([colour for _, colour in found]) @ (1 << 16, 1 << 8, 1)).tolist()
    return packed


# -- JPEG ---------------------------------------------------------------------------------------------------


def _jpeg(image: Image.Image, quality: int) -> bytes:
    buffer, block = io.BytesIO(), ImageFile.MAXBLOCK
    pixels = (image.width + 8) * (image.height + 8)
    ImageFile.MAXBLOCK = max(block, min(4 * pixels, 4 * OPTIMISED))  # Pillow's own may be too small for noise
    try:
        image.save(buffer, "JPEG", quality=quality, subsampling=0, optimize=pixels <= OPTIMISED)
    except OSError as error:  # nothing else stops libjpeg's writing into memory
        raise MemoryError from error
    finally:
        ImageFile.MAXBLOCK = block
    return buffer.getvalue()


def _quality(original: bytes) -> int | None:
    """Return the quality to write a JPEG at that came with loss, None for a file without."""
    if original[4:8] == b"ftyp" or (original[:4] == b"RIFF" and original[12:16] == b"VP8 "):  # AVIF, WebP
        return BEST
    if not original.startswith(b"\xff\xd8\xff"):
        return None
    with Image.open(io.BytesIO(original), formats=("JPEG",)) as opened:
        assert isinstance(opened, JpegImagePlugin.JpegImageFile)
        tables = opened.quantization
    if not tables:
        return BEST
    scale = 100 * sum(tables[min(tables)]) / _plain_table()
    return max(1, min(BEST, round((200 - scale) / 2 if scale <= 100 else 5000 / scale)))


@cache
def _plain_table() -> int:
    """Return the sum of the table of quality 50, by which libjpeg's other qualities are scaled."""
    with Image.open(io.BytesIO(_jpeg(Image.new("L", (8, 8)), 50))) as opened:
        assert isinstance(opened, JpegImagePlugin.JpegImageFile)
        return sum(opened.quantization[0])
