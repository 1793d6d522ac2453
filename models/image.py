"""From an image file to the picture a person would see: RGB, 8 bit, upright.

Only Pillow's own decoders of the formats below are tried; those that start other programs (EPS) are not.
"""

from __future__ import annotations

import io
import struct
import threading
import warnings
import zlib
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np
from PIL import Image, UnidentifiedImageError

from models.errors import ImageFileError
from models.regular_file import open_regular

__all__ = ["IMAGE_SUFFIXES", "MAX_PIXELS", "MAX_SIDE", "open_image", "to_rgb"]

MAX_PIXELS = 50_000_000
"""A larger picture is refused before it is decoded."""
MAX_SIDE = 65_535
"""The longest side JPEG can state, in pixels; a longer one is no photograph."""

EAGER_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM")
"""Loaded with Pillow itself; the others only when a file is none of these."""
LATE_FORMATS = ("WEBP", "TIFF", "MPO", "JPEG2000", "AVIF")
FORMATS_TEXT = "JPEG, PNG, WebP, TIFF, BMP, GIF, JPEG 2000, AVIF or PPM"
IMAGE_SUFFIXES = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".jpe",
        ".png",
        ".webp",
        ".tif",
        ".tiff",
        ".bmp",
        ".gif",
        ".jp2",
        ".j2k",
        ".avif",
        ".ppm",
        ".pgm",
        ".pbm",
    ]
)
"""File names that are taken for images when a folder is searched, in lower case."""

ORIENTATION_TAG = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF 2.3, tag 274: what turns the stored picture upright."""

OPAQUE_MODES = frozenset(("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"))
ALPHA_MODES = frozenset(("LA", "La", "PA", "RGBA", "RGBa"))
SIXTEEN_BIT_MODES = frozenset(("I;16", "I;16B", "I;16L", "I;16N"))

DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    RuntimeError,  # AVIF
    MemoryError,  # a header that states a giant buffer
    Image.DecompressionBombError,
)
"""What Pillow's decoders raise on damaged files; caught around their calls only."""

_OPENING = threading.Lock()


def open_image(source: Path | bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image file, or the bytes of one, to an upright RGB picture of 8 bits a channel.

    Transparency (alpha, palette or colour key) is composited on white, as a viewer shows it. CMYK is
    converted as Pillow does, Adobe's inverted kind included; 16 bits keep their upper eight; EXIF
    orientation is applied. A phone's JPEG with further pictures behind the first (MPO) is its first picture.

    Raises ImageFileError for a file that is missing, empty, no image, damaged or truncated, holds more than
    one picture, has a mode of no plain colour, or states more than ``max_pixels``; it is not decoded then.
    """
    where = "the given bytes" if isinstance(source, bytes) else str(source)
    if isinstance(source, bytes):
        if not source:
            _refuse(where, "it is empty (0 bytes)")
        return _decode(io.BytesIO(source), where, max_pixels)
    try:
        if not source.is_file():
            _refuse(where, "it is not a file" if source.exists() else "there is no such file")
        if source.stat().st_size == 0:
            _refuse(where, "it is empty (0 bytes)")
        with open_regular(source) as stream:
            return _decode(stream, where, max_pixels)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        _refuse(where, f"it cannot be read ({getattr(error, 'strerror', None) or error})", error)


def to_rgb(image: Image.Image, *, where: str = "the given picture") -> Image.Image:
    """Turn an opened picture upright and into RGB, as :func:`open_image` does with a file."""
    try:
        image.load()
        turn = UPRIGHT.get(image.getexif().get(ORIENTATION_TAG, 1))
        rgb = _rgb(image, where)
        return rgb if turn is None else rgb.transpose(turn)
    except DECODER_ERRORS as error:
        _refuse(where, f"its pixels cannot be decoded ({error})", error)


def _decode(stream: BinaryIO, where: str, max_pixels: int) -> Image.Image:
    with _open(stream, where) as image:
        _check_header(image, where, max_pixels)
        return to_rgb(image, where=where)


def _open(stream: BinaryIO, where: str) -> Image.Image:
    """Read the header. Pillow's warning about size is turned off: `_check_header` decides on every size."""
    try:
        with _OPENING, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return Image.open(stream, formats=EAGER_FORMATS)
            except UnidentifiedImageError:
                Image.init()
                stream.seek(0)
                return Image.open(stream, formats=[name for name in LATE_FORMATS if name in Image.OPEN])
    except UnidentifiedImageError as error:
        _refuse(where, "it is not an image of a known format, or its header is damaged", error)
    except Image.DecompressionBombError as error:
        _refuse(where, f"it is too large to be decoded ({error})", error)
    except DECODER_ERRORS as error:
        _refuse(where, f"its header is damaged ({error})", error)


def _check_header(image: Image.Image, where: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels or max(width, height) > MAX_SIDE:
        raise ImageFileError(
            f"{where}: the picture has {width} x {height} pixels. Allowed are {max_pixels:,} pixels and "
            f"{MAX_SIDE:,} a side; make it smaller and try again."
        )
    try:
        several = image.format != "MPO" and getattr(image, "is_animated", False)
    except DECODER_ERRORS as error:
        _refuse(where, f"its frames cannot be counted ({error})", error)
    if several:
        raise ImageFileError(
            f"{where}: it is animated or has several pages. Allowed is one picture a file: a verdict on the "
            "first would say nothing of the others. Save each frame as a file and judge all of them."
        )


def _rgb(image: Image.Image, where: str) -> Image.Image:
    """Convert every mode that stands for plain colour; ImageFileError for the others."""
    mode = image.mode
    if mode in SIXTEEN_BIT_MODES or (mode == "I" and image.format in ("PNG", "PPM")):
        return _from_sixteen_bit(image)
    if mode in ALPHA_MODES or (mode in OPAQUE_MODES and _has_colour_key(image)):
        return _on_white(image)
    if mode in OPAQUE_MODES:
        return image.convert("RGB")
    raise ImageFileError(
        f"{where}: mode {mode} is not supported. Allowed are grey, palette, RGB, CMYK and YCbCr "
        "with or without transparency, at 8 or 16 bits; save it as an RGB PNG and try again."
    )


def _has_colour_key(image: Image.Image) -> bool:
    """Say whether a palette has transparent entries, or one colour stands for transparent.

    A key above 255 belongs to a 16-bit file, whose pixels are no longer there to be compared with it.
    """
    if not image.has_transparency_data:
        return False
    key = image.info.get("transparency")
    values = key if isinstance(key, tuple) else (key,)
    return not any(isinstance(value, int) and value > 255 for value in values)


def _on_white(image: Image.Image) -> Image.Image:
    layer = image.convert("RGBA")
    white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, layer).convert("RGB")


def _from_sixteen_bit(image: Image.Image) -> Image.Image:
    grey = np.clip(np.asarray(image).astype(np.int64), 0, 65_535) >> 8
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


def _refuse(where: str, reason: str, cause: BaseException | None = None) -> NoReturn:
    raise ImageFileError(
        f"{where}: {reason}. Allowed is one complete {FORMATS_TEXT} picture; save or download it again."
    ) from cause
