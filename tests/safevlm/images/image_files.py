"""Image files that Pillow does not write, and readers of image files that are not Pillow."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Levels = NDArray[Any]
SRGB = ((0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141))
DISPLAY_P3 = ((0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841))


def encoded(image: Image.Image, kind: str, **settings: Any) -> bytes:
    """Return an image as a file."""
    stream = io.BytesIO()
    image.save(stream, kind, **settings)
    return stream.getvalue()


def smooth(seed: int, height: int, width: int, bands: int) -> Levels:
    """Return an image that lossy formats keep nearly as it is: uint8 H x W, or H x W x bands."""
    rng = np.random.default_rng(seed)
    parts = [Image.fromarray(rng.integers(0, 256, (3, 4), dtype=np.uint8)) for _ in range(bands)]
    levels = np.stack([np.asarray(part.resize((width, height), Image.Resampling.BICUBIC)) for part in parts], axis=-1)
    return levels[..., 0] if bands == 1 else levels


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: tuple[bytes, bytes]) -> bytes:
    """Return a PNG of any kind; ``rows`` begin with their filter's byte."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def packed(samples_HW: Levels, depth: int) -> bytes:
    """Return rows of a PNG: samples of 1, 2, 4, 8 or 16 bits, unfiltered."""
    height = len(samples_HW)
    if depth == 16:
        return b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples_HW)
    flat = samples_HW.reshape(height, -1).astype(np.uint8)
    bits = np.unpackbits(flat[..., None], axis=2)[..., 8 - depth :].reshape(height, -1)
    return b"".join(b"\0" + np.packbits(row).tobytes() for row in bits)


def bmp(pixels: bytes, width: int, height: int, bits: int, *, compression: int = 0, palette: bytes = b"") -> bytes:
    """Return a Windows bitmap with the header of version 3."""
    header = struct.pack(
        "<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(pixels), 0, 0, len(palette) // 4, 0
    )
    start = 54 + len(palette)
    return b"BM" + struct.pack("<IHHI", start + len(pixels), 0, 0, start) + header + palette + pixels


def with_extra_samples(tiff: bytes, meaning: int) -> bytes:
    """Return a little-endian TIFF of RGBA whose fourth channel means something else: 0 nothing stated, 1 associated."""
    entry = struct.pack("<HHI", 338, 3, 1)
    assert tiff.count(entry + b"\2\0") == 1
    return tiff.replace(entry + b"\2\0", entry + bytes((meaning, 0)))


def profile(curve: Levels, primaries: tuple[tuple[float, float, float], ...] | None = SRGB) -> bytes:
    """Return an ICC profile of one curve (0..1) and the primaries of RGB, None for grey."""
    tags = [(b"desc", b"desc\0\0\0\0" + struct.pack(">I", 2) + b"x\0" + bytes(78)), (b"cprt", b"text\0\0\0\0x\0")]
    tags.append((b"wtpt", _xyz(0.9642, 1, 0.8249)))
    tone = b"curv\0\0\0\0" + struct.pack(">I", len(curve)) + np.rint(curve * 65535).astype(">u2").tobytes()
    if primaries is None:
        tags.append((b"kTRC", tone))
    else:
        for letter, primary in zip(b"rgb", primaries, strict=True):
            tags += [(bytes((letter,)) + b"XYZ", _xyz(*primary)), (bytes((letter,)) + b"TRC", tone)]
    table, body, start = b"", b"", 132 + 12 * len(tags)
    for name, data in tags:
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    space = b"RGB " if primaries else b"GRAY"
    head = struct.pack(">I4sI4s4s4s12x4s28x", start + len(body), b"", 0x02100000, b"mntr", space, b"XYZ ", b"acsp")
    return (head + _xyz(0.9642, 1, 0.8249)[8:]).ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def _xyz(*values: float) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def as_others_read(content: bytes) -> Iterator[tuple[str, Levels]]:
    """Yield what OpenCV and libvips make of a file, each in its ways, as RGB of 8 bits; nothing where they refuse."""
    yield from _opencv(content)
    yield from _libvips(content)


def _opencv(content: bytes) -> Iterator[tuple[str, Levels]]:
    import cv2

    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    ways = {
        "opencv": cv2.IMREAD_COLOR,
        "opencv, not turned": cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION,
        "opencv, alpha dropped": cv2.IMREAD_UNCHANGED,
    }
    for name, way in ways.items():
        try:
            read = cv2.imdecode(np.frombuffer(content, np.uint8), way)
        except cv2.error:
            continue
        if read is None or read.dtype not in (np.uint8, np.uint16):
            continue
        read = (read >> 8).astype(np.uint8) if read.dtype == np.uint16 else read
        if read.ndim == 2:
            yield name, np.repeat(read[..., None], 3, axis=2)
        elif read.shape[2] >= 3:
            yield name, read[..., 2::-1]


def _libvips(content: bytes) -> Iterator[tuple[str, Levels]]:
    import pyvips

    def rgb(image: Any) -> Levels:
        if image.format == "ushort":
            image = (image >> 8).cast("uchar").copy(interpretation="srgb" if image.bands >= 3 else "b-w")
        levels: Levels = np.asarray(image.colourspace("srgb").numpy())
        return levels[..., :3]

    try:
        read = pyvips.Image.new_from_buffer(content, "")
        if read.format not in ("uchar", "ushort"):
            return
        yield "libvips", rgb(read)
        yield "libvips, turned", rgb(read.autorot())
        if read.hasalpha():
            full = 65535 if read.format == "ushort" else 255
            for name, level in (("white", full), ("black", 0)):
                yield f"libvips, on {name}", rgb(read.flatten(background=[level], max_alpha=full))
        if read.get_typeof("icc-profile-data"):
            yield "libvips, colour-managed", rgb(read.icc_transform("srgb"))
    except pyvips.Error:
        return
