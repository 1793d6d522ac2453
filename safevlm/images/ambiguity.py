"""What in a file's structure lets two readers see two images, one of which Pillow does not decode.

Each check runs before the pixels are decoded and answers with a reason, or None.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable, Mapping
from typing import IO, Any

from PIL import Image
from PIL.ImagePalette import ImagePalette

__all__ = ["ambiguity", "gif_background", "png_background", "raw_mode"]

ONCE = (b"IHDR", b"PLTE", b"tRNS", b"gAMA", b"iCCP", b"cICP", b"bKGD")
MOST_CHUNKS = 100_000
PALETTE = 3
"""The colour type in IHDR."""
CHROMATICITIES = ((0.3127, 0.329), (0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
"""White, red, green and blue of sRGB, x and y."""
CHROMATICITY_REACH = (0.06, 0.3, 0.3, 0.3)
"""How far the primaries of real displays and of ProPhoto lie from these."""
SDR_TRANSFERS = (1, 4, 6, 13, 14, 15)
"""ITU-T H.273: curves close to sRGB's; the others, PQ and HLG among them, show another image where they are ignored."""
BITS, COMPRESSION, PHOTOMETRIC, PLANAR, SUB_IFDS, EXTRA_SAMPLES, SAMPLE_FORMAT = 258, 259, 262, 284, 330, 338, 339
WHITE_IS_ZERO, YCBCR, JPEG, SIGNED = 0, 6, (6, 7), 2
"""Values of these TIFF tags."""


def ambiguity(image: Image.Image) -> str | None:
    """Return why readers disagree about an opened file that is not loaded yet, None where they need not.

    Leaves the file's position as it was. An image without a file has no structure that could be looked at.
    """
    check = CHECKS.get(image.format or "")
    stream = getattr(image, "fp", None)
    if check is None or stream is None:
        return None
    position = stream.tell()
    try:
        return check(image, stream)
    finally:
        stream.seek(position)


def png_background(image: Image.Image) -> tuple[int, int, int] | None:
    """Return the colour that a PNG of 8 bits or fewer, not loaded yet, wants to be shown on."""
    stream = getattr(image, "fp", None)
    if image.format != "PNG" or stream is None:
        return None
    position = stream.tell()
    try:
        found = next((data for name, data in _chunks(stream) if name == b"bKGD"), b"")
    finally:
        stream.seek(position)
    return _colour(found, image)


def gif_background(image: Image.Image) -> tuple[int, int, int] | None:
    """Return the colour that a GIF states for what its frame leaves out, which some readers show through it."""
    return _entry(getattr(image, "global_palette", None), image.info.get("background", 0))


def _entry(palette: ImagePalette | None, at: int) -> tuple[int, int, int] | None:
    table = b"" if palette is None else palette.getdata()[1][3 * at : 3 * at + 3]
    return (table[0], table[1], table[2]) if len(table) == 3 else None


def _colour(chunk: bytes, image: Image.Image) -> tuple[int, int, int] | None:
    if len(chunk) == 1 and image.mode == "P":
        return _entry(image.palette, chunk[0])
    if len(chunk) not in (2, 6):
        return None
    most = {"1": 1, "L;2": 3, "L;4": 15}.get(raw_mode(image), 65_535 if "16" in raw_mode(image) else 255)
    levels = [min(255, level * 255 // most) for level in struct.unpack(f">{len(chunk) // 2}H", chunk)]
    return levels[0], levels[len(levels) // 2], levels[-1]


def raw_mode(image: Image.Image) -> str:
    """Return how Pillow is about to unpack an opened file's samples, "" once it has."""
    tiles = getattr(image, "tile", None)
    arguments = tiles[0][3] if tiles else ""
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


# -- PNG ----------------------------------------------------------------------------------------------------


def _chunks(stream: IO[bytes]) -> list[tuple[bytes, bytes]]:
    """Return the names of a PNG's chunks up to IEND, each with the first 32 of its bytes."""
    found: list[tuple[bytes, bytes]] = []
    stream.seek(8)
    while len(head := stream.read(8)) == 8 and len(found) < MOST_CHUNKS:
        length, name = struct.unpack(">I4s", head)
        data = stream.read(min(length, 32))
        found.append((name, data))
        if name == b"IEND":
            break
        stream.seek(length - len(data) + 4, os.SEEK_CUR)
    return found


def _png(image: Image.Image, stream: IO[bytes]) -> str | None:
    chunks = _chunks(stream)
    if len(chunks) >= MOST_CHUNKS:
        return f"it has more than {MOST_CHUNKS:,} chunks"
    names = [name for name, _ in chunks]
    if b"fdAT" in names:
        return "it has more than one frame (fdAT)"
    twice = next((name for name in ONCE if names.count(name) > 1), None)
    if twice is not None:
        return f"it has two {twice.decode()} chunks, and readers differ in which one they use"
    first = dict(reversed(chunks))
    depth, kind = first[b"IHDR"][8:10]
    if b"tRNS" in names and kind != PALETTE:
        key = first[b"tRNS"]
        if depth == 16 and image.mode == "RGB":
            return "it makes a colour with 16 bits per channel transparent"
        if any(int.from_bytes(key[at : at + 2], "big") >> depth for at in range(0, len(key), 2)):
            return f"its transparent colour does not fit into {depth} bits"
    if b"cICP" in names and not _is_sdr(first[b"cICP"]):
        return f"its colours are HDR (cICP {', '.join(map(str, first[b'cICP'][:4]))}), which only some readers show"
    return (
        None if _are_primaries(image.info.get("chromaticity")) else "its primaries (cHRM) are those of no real display"
    )


def _is_sdr(cicp: bytes) -> bool:
    return len(cicp) == 4 and cicp[1] in SDR_TRANSFERS


def _are_primaries(stated: object) -> bool:
    if not isinstance(stated, tuple) or len(stated) != 8:
        return True
    points = zip(stated[::2], stated[1::2], strict=True)
    return all(
        abs(x - x0) <= reach and abs(y - y0) <= reach
        for (x, y), (x0, y0), reach in zip(points, CHROMATICITIES, CHROMATICITY_REACH, strict=True)
    )


# -- the other formats --------------------------------------------------------------------------------------


def _bmp(image: Image.Image, stream: IO[bytes]) -> str | None:
    stream.seek(0)
    header = stream.read(70)
    bits, compression = struct.unpack_from("<HI", header, 28) if len(header) >= 34 else (0, 0)
    if compression in (1, 2):
        stream.seek(image.tile[0][2])  # type: ignore[attr-defined]  # of ImageFile
        if not _is_covered(stream.read(), *image.size, four_bits=compression == 2):
            return "its run lengths skip pixels, which some readers show as transparent"
    long_header = len(header) == 70 and struct.unpack_from("<I", header, 14)[0] >= 56
    if bits == 16 and compression == 3 and long_header and struct.unpack_from("<I", header, 66)[0]:
        return "it has 16 bits per pixel with transparency, which only some readers support"
    return None


def _is_covered(runs: bytes, width: int, height: int, *, four_bits: bool) -> bool:
    """Say whether a bitmap's run lengths name every pixel of every row."""
    x = y = at = 0
    while at + 1 < len(runs):
        count, value = runs[at], runs[at + 1]
        at += 2
        if count:
            x += count
        elif value >= 3:  # that many pixels follow, to an even number of bytes
            x += value
            size = (value + 1) // 2 if four_bits else value
            at += size + size % 2
        elif value == 2 or x != width:
            # A move; or a row, or the image, that ends early. The last row may end without a mark of its own.
            return value == 1 and x == 0 and y == height
        else:
            x, y = 0, y + 1
            if value == 1:
                return y == height
    return False


def _pnm(image: Image.Image, stream: IO[bytes]) -> str | None:
    codec, _, offset, arguments = image.tile[0]  # type: ignore[attr-defined]  # of ImageFile
    stream.seek(offset)
    if codec == "ppm_plain":
        rest = re.sub(rb"#[^\r\n]*", b"", stream.read())
        maxval = arguments[1] if isinstance(arguments, tuple) else 255
        if maxval not in (255, 65_535):
            return f"its grey levels go up to {maxval}, which some readers read as 255"
        return "several images follow one another in it" if b"P" in rest else None
    width, height = image.size
    bands, wide = len(image.getbands()), image.mode == "I" or (isinstance(arguments, tuple) and arguments[1] > 255)
    stream.seek(offset + ((width + 7) // 8 * height if image.mode == "1" else width * height * bands * (1 + wide)))
    return "several images follow one another in it" if re.match(rb"\s*P[0-7yFf]\s", stream.read(64)) else None


def _tiff(image: Image.Image, _: IO[bytes]) -> str | None:
    tags: Mapping[int, Any] = image.tag_v2  # type: ignore[attr-defined]  # of TiffImageFile
    bits, photometric, extra = max(tags.get(BITS, (1,))), tags.get(PHOTOMETRIC), tags.get(EXTRA_SAMPLES, ())
    if SUB_IFDS in tags:
        return "it holds more than one image (SubIFDs)"
    if tags.get(PLANAR) == 2 and bits > 8:
        return "its 16-bit channels are stored in separate planes, which some readers mix up"
    if extra and (image.mode == "CMYK" or (tags.get(PLANAR) == 2 and max(extra) == 0)):
        return "it has an extra channel, which some readers take for transparency"
    if photometric == WHITE_IS_ZERO and bits > 8:
        return "its 16-bit levels run from white to black, which some readers ignore"
    if max(tags.get(SAMPLE_FORMAT, (1,))) == SIGNED:
        return "its levels are signed, which some readers ignore"
    if photometric == YCBCR and tags.get(COMPRESSION) not in JPEG:
        return "it is YCbCr, which some readers read as RGB or arrange differently"
    return None


def _jpeg(image: Image.Image, _: IO[bytes]) -> str | None:
    if "jfif" in image.info and image.info.get("adobe_transform") == 0 and image.mode == "RGB":
        return "its JFIF marker says that its colours are YCbCr, its Adobe marker that they are RGB"
    return None


def _avif(_: Image.Image, stream: IO[bytes]) -> str | None:
    stream.seek(0)
    head = stream.read(256)
    brands = head[8 : min(len(head), struct.unpack_from(">I", head)[0])]
    return "it is an image sequence (avis)" if b"avis" in brands else None


CHECKS: Mapping[str, Callable[[Image.Image, IO[bytes]], str | None]] = {
    "PNG": _png,
    "BMP": _bmp,
    "PPM": _pnm,
    "TIFF": _tiff,
    "JPEG": _jpeg,
    "MPO": _jpeg,
    "AVIF": _avif,
}
