"""From an image file to the image a person would see, and to those that other readers show: RGB, 8 bit.

Only Pillow's own decoders of the formats below are tried; those that start other programs (EPS) are not.
"""

from __future__ import annotations

import io
import os
import struct
import threading
import warnings
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NoReturn

from PIL import Image, UnidentifiedImageError

from safevlm.errors import ImageFileError, ImageFormatError
from safevlm.files.regular_file import open_regular
from safevlm.images.jpeg_images import has_more_scans, images_behind
from safevlm.images.views import USUAL, View, views

__all__ = ["FORMATS", "MAX_PIXELS", "MAX_SIDE", "View", "open_image", "open_views", "to_rgb", "to_views"]

MAX_PIXELS = 50_000_000
"""A larger image is refused before it is decoded."""
MAX_SIDE = 65_535
"""The longest side JPEG can state, in pixels; a longer one is no photograph."""
MAX_JPEG_BYTES = 1 << 30
MOST_SCANS = 500
"""Scans of one JPEG; a progressive one has about ten. A few bytes can make each take as long as the whole image."""
MOST_IMAGES = 16
"""Images in one JPEG file, MPO included; a camera's burst or panorama has fewer."""

EAGER_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM")
"""Loaded with Pillow itself; the others only when a file is none of these."""
LATE_FORMATS = ("WEBP", "TIFF", "MPO", "JPEG2000", "AVIF")
FORMATS = tuple(name for name in (*EAGER_FORMATS, *LATE_FORMATS) if name != "MPO")
"""As Pillow calls them. An MPO is a JPEG."""
FORMAT_NAMES = {"WEBP": "WebP", "JPEG2000": "JPEG 2000"}
"""As people call them, where that differs."""
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
    """Decode an image file, or the bytes of one, to an upright RGB image of 8 bits a channel: its usual view.

    Transparency (alpha, palette or colour key) is composited on white, as a viewer shows it. CMYK is
    converted as Pillow does, Adobe's inverted kind included; 16 bits keep their upper eight; EXIF
    orientation is applied. A phone's JPEG with further images behind the first (MPO) is its first image.

    Raises ImageFileError for a file that is missing, empty, no image, damaged or truncated, holds more than
    one image, has a mode of no plain colour, or states more than ``max_pixels``; it is not decoded then.
    """
    return next(open_views(source, max_pixels=max_pixels)).image


def open_views(
    source: Path | bytes, *, max_pixels: int = MAX_PIXELS, formats: Collection[str] = FORMATS
) -> Iterator[View]:
    """Yield the views of an image file, or of the bytes of one, the usual one first; see ``safevlm.images.views``.

    Of an image in none of the ``formats`` no more than the first bytes are looked at: ImageFormatError.

    Raises what :func:`open_image` does, at any view, and ImageFileError after the usual view where it is unknown what
    other readers show: only after all views has a file been seen completely.
    """
    where = "the given bytes" if isinstance(source, bytes) else str(source)
    with _stream(source, where) as stream:
        with _open(stream, where, formats) as image:
            _check_header(image, where, max_pixels)
            further: Iterator[bytes] = iter(())
            if image.format in ("JPEG", "MPO"):
                further = images_behind(_jpeg_content(stream, where), indexed="mp" in image.info)
            yield from _decoded(image, where)
        for number, content in enumerate(further, 2):
            if number > MOST_IMAGES:
                _refuse(where, f"it holds more than {MOST_IMAGES} images")
            yield from _further(content, f"image {number}", where, max_pixels)


def to_rgb(image: Image.Image, *, where: str = "the given image") -> Image.Image:
    """Turn an opened image upright and into RGB, as :func:`open_image` does with a file."""
    return next(to_views(image, where=where)).image


def to_views(image: Image.Image, *, where: str = "the given image") -> Iterator[View]:
    """Yield the views of an opened image, as :func:`open_views` does of a file; of an MPO, those of its frame alone."""
    return _decoded(image, where)


@contextmanager
def _stream(source: Path | bytes, where: str) -> Iterator[BinaryIO]:
    """Open a regular file that is not empty, or bytes."""
    if isinstance(source, bytes):
        if not source:
            _refuse(where, "it is empty (0 bytes)")
        yield io.BytesIO(source)
        return
    try:
        stream = open_regular(source)
    except FileNotFoundError as error:
        _refuse(where, "there is no such file", error)
    except OSError as error:
        _refuse(where, f"it cannot be read ({error.strerror or error})", error)
    with stream:
        if os.fstat(stream.fileno()).st_size == 0:
            _refuse(where, "it is empty (0 bytes)")
        yield stream


def _decoded(image: Image.Image, where: str) -> Iterator[View]:
    try:
        yield from views(image, where)
    except DECODER_ERRORS as error:
        _refuse(where, f"its pixels cannot be decoded ({error})", error)


def _jpeg_content(stream: BinaryIO, where: str) -> bytes:
    """Return the whole of a JPEG file, its position left as it is, if it can be decoded in reasonable time."""
    position = stream.tell()
    try:
        stream.seek(0)
        content = stream.read(MAX_JPEG_BYTES + 1)
        stream.seek(position)
    except OSError as error:
        _refuse(where, f"it cannot be read ({error.strerror})", error)
    if len(content) > MAX_JPEG_BYTES:
        _refuse(where, f"it has more than {MAX_JPEG_BYTES:,} bytes, too many for a JPEG")
    _check_scans(content, where)
    return content


def _check_scans(content: bytes, where: str) -> None:
    if has_more_scans(content, MOST_SCANS):
        _refuse(where, f"it has more than {MOST_SCANS} scans, too many for a JPEG")


def _further(content: bytes, name: str, where: str, max_pixels: int) -> Iterator[View]:
    """Yield the views of an image behind the first of a JPEG; none where what is there is no image after all."""
    try:
        image = _open(io.BytesIO(content), where)
    except ImageFileError:
        return
    with image:
        _check_header(image, where, max_pixels)
        _check_scans(content, where)
        for view in _decoded(image, where):
            yield View(name if view.name == USUAL else f"{name}, {view.name}", view.image)


def _open(stream: BinaryIO, where: str, formats: Collection[str] = FORMATS) -> Image.Image:
    """Read the header. Pillow's warning about size is turned off: `_check_header` decides on every size."""
    try:
        with _OPENING, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return Image.open(stream, formats=[name for name in EAGER_FORMATS if name in formats])
            except UnidentifiedImageError:
                Image.init()
                stream.seek(0)
                _check_format(stream, where, formats)
                late = (name for name in LATE_FORMATS if name in formats or (name == "MPO" and "JPEG" in formats))
                return Image.open(stream, formats=[name for name in late if name in Image.OPEN])
    except UnidentifiedImageError as error:
        _refuse(where, "it is not an image of a known format, or its header is damaged", error, formats)
    except Image.DecompressionBombError as error:
        _refuse(where, f"it is too large to be decoded ({error})", error)
    except DECODER_ERRORS as error:
        _refuse(where, f"its header is damaged ({error})", error, formats)


def _check_format(stream: BinaryIO, where: str, formats: Collection[str]) -> None:
    """Refuse a file that begins as one of a format which Pillow knows, and the caller does not take."""
    if set(formats) >= set(FORMATS):
        return
    beginning = stream.read(16)
    stream.seek(0)
    begun = [name for name, (_, accepts) in Image.OPEN.items() if accepts is not None and accepts(beginning)]
    if begun and not set(begun) & set(formats):
        raise ImageFormatError(
            f"{where}: the format {begun[0]} is not accepted. Allowed are {', '.join(sorted(formats))}."
        )


def _check_header(image: Image.Image, where: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels or max(width, height) > MAX_SIDE:
        raise ImageFileError(
            f"{where}: the image has {width} x {height} pixels. At most {max_pixels:,} pixels, and {MAX_SIDE:,} per "
            "side, are allowed. Make it smaller and try again."
        )
    try:
        several = image.format != "MPO" and getattr(image, "is_animated", False)
    except DECODER_ERRORS as error:
        _refuse(where, f"its frames cannot be counted ({error})", error)
    if several:
        raise ImageFileError(
            f"{where}: it is animated or has several pages. Only one image per file is allowed: a verdict on the "
            "first would say nothing about the others. Save each frame as a file and judge all of them."
        )


def _refuse(
    where: str, reason: str, cause: BaseException | None = None, formats: Collection[str] = FORMATS
) -> NoReturn:
    *others, last = (FORMAT_NAMES.get(name, name) for name in FORMATS if name in formats)
    allowed = f"{', '.join(others)} or {last}" if others else last
    raise ImageFileError(
        f"{where}: {reason}. Allowed is one complete {allowed} image; save or download it again."
    ) from cause
