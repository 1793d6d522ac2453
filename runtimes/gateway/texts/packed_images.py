"""Image files written as text: data URLs, and base64, hexadecimal digits or base85 that decode to one.

A file is recognised by its first bytes. Outside of a data URL, those bytes alone are not a file: :data:`LEAST` bytes
must follow, which is less than any image that shows something.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Iterator

from runtimes.gateway.texts.plain_text import squeezed

__all__ = ["has_data_url", "has_packed_image", "is_image"]

LEAST = 30
MAX_HITS = 5_000
"""Places in a text that look like a file's beginning and are none; more are taken for one."""
MAX_URLS = 100_000
"""Data URLs of a text that are looked at; a text with more is taken for one with an image."""
MAGIC = (
    *(b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"RIFF", b"II*\0", b"MM\0*", b"8BPS", b"%PDF", b"<svg", b"\0\0\1\0"),
    *(b"\0\0\0\x0cjP  \r\n\x87\n", b"\0\0\0\x0cJXL \r\n\x87\n", b"\xff\x4f\xff\x51", b"\0\0\2\0", b"II+\0", b"MM\0+"),
    *(b"\x8aMNG\r\n\x1a\n", b"\x8bJNG\r\n\x1a\n", b"DDS ", b"icns", b"qoif", b"\x76\x2f\x31\x01", b"#?RADIANCE"),
    *(b"SIMPLE  =", b"II\xbc\x01", b"P4\n", b"P5\n", b"P6\n", b"P5 ", b"P6 ", b"data:image/"),
    b"farbfeld",
)
""":data:`COMMON` of them, of at least four bytes each, are also looked for in base85."""
COMMON = 13
MARKERS = (*range(0xC0, 0xC5), *range(0xDA, 0xDF), *range(0xE0, 0xF0), 0xFE, 0xFF)
"""What follows FF D8 FF in a JPEG file."""
FILE = re.compile(
    rb"\x89PNG\r\n\x1a\n(?=.{4}[A-Za-z]{4}|.{0,7}\Z)|\xff\xd8\xff(?=[\xc0-\xc4\xda-\xef\xfe\xff]|\Z)|GIF8[79]a|"
    rb"RIFF.{4}(?:WEBP|ACON)|BM.{4}\0\0\0\0.{4}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0|"
    rb"II[*+]\0|MM\0[*+]|.{4}ftyp(?:av|he|mi|ms|jp|jx|cr|mp4)|\0\0\0\x0c(?:jP  |JXL )\r\n\x87\n|\xff\x4f\xff\x51|"
    rb"\0\0[\1\2]\0[^\0]\0.{3}\0[\0\1]\0[\x01\x04\x08\x10\x18\x20]\0|8BPS\0[\1\2]\0{6}|%PDF-[12]|"
    rb"\x8aMNG\r\n|\x8bJNG\r\n|DDS \x7c\0\0\0|icns\0|qoif\0|\x76\x2f\x31\x01[\2]|#\?RADIANCE|SIMPLE  =|II\xbc\x01|"
    rb"farbfeld|P[456]\s+(?:#[^\n]*\n\s*)*[0-9]+\s+[0-9]+\s|<svg|data:image/",
    re.DOTALL,
)
SHORT = re.compile(
    rb"\x01\xda[\0\1]|BLP[12]|DanM|LinS|Image type:|#define[ \t]+\w+_width|\x59\xa6\x6a\x95|\xd7\xcd\xc6\x9a|"
    rb"[\x0c\x28\x6c\x7c]\0\0\0|\xff\x0a|P[1-7][\s#]|\x0a[\0-\5]\x01[\1\2\4\x08]|\0\0[\1\2]\0|BM|%!PS|\xef\xbb\xbf\s*<|\s*<(?:\?xml|svg|!--)",
    re.DOTALL,
)
"""Beginnings that are too short to be looked for in the midst of a text; in a data URL they are an image."""
NESTED = re.compile(rb"<svg|<img|<image|data:image/", re.IGNORECASE)
"""In a page or a text that is itself a data URL."""
DATA = re.compile(r"d\s*a\s*t\s*a\s*:", re.IGNORECASE)
IMAGE_TYPE = re.compile(r"/*image/", re.IGNORECASE)
ANY_TYPE = re.compile(r"/*(?:[\w.+*-]+/[\w.+*-]+)?(?:;[^;]*)*")
RUN = re.compile(r"[A-Za-z0-9+/_=\s-]*")
UNBROKEN = re.compile(r"[A-Za-z0-9+/_=-]*")
RAW = re.compile(r"[^\s\"'`<>()\[\]{}.,;…]*")
MARKUP = re.compile(r"<[?!/a-z]", re.IGNORECASE)
TYPE_MAX = 1024
STAND_IN = re.compile(r"base64|data|encod|your|string|image|payload|here|xxx|example", re.IGNORECASE)
STAND_IN_MAX = 40
PROSE = 0.75
"""Share of small letters that prose has and base64 (0.41) has not."""
STANDARD = str.maketrans("-_", "+/")
FILE_MAX = 4096
Z85 = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"
B85 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%&()*+-;<=>?@^_`{|}~"
FROM_Z85, TO_Z85 = str.maketrans(Z85, B85), bytes.maketrans(B85.encode(), Z85.encode())


def is_image(content: bytes) -> bool:
    """Say whether bytes begin as an image file, or another that servers make images of, does."""
    return FILE.match(content) is not None


def has_data_url(text: str) -> bool:
    """Say whether a text holds a data URL of an image, by its type or by its content."""
    pieces = [piece for piece in DATA.split(text)[1:] if "," in piece]
    return len(pieces) > MAX_URLS or any(_is_image_url(*piece.split(",", 1)) for piece in pieces)


def _is_image_url(head: str, rest: str) -> bool:
    head = squeezed(head[:TYPE_MAX] if len(head) <= TYPE_MAX else f"{head[:TYPE_MAX]};{head[-16:]}")
    claimed = IMAGE_TYPE.match(head) is not None
    if head[-6:].lower() != "base64":
        typed = claimed or ANY_TYPE.fullmatch(head) is not None
        return typed and _is_raw_image(rest, claimed)
    run = RUN.match(rest)
    assert run is not None
    packed = squeezed(run[0][: 4 * FILE_MAX])
    content = _from_base64(packed)
    if is_image(content) or SHORT.match(content) or NESTED.search(content):
        return True
    unbroken = UNBROKEN.match(rest)
    assert unbroken is not None
    return claimed and (_is_payload(unbroken[0]) or (len(packed) > STAND_IN_MAX and not _is_prose(packed)))


def _is_raw_image(rest: str, claimed: bool) -> bool:
    """Say whether what follows the comma, which is not base64, is an image: SVG, or bytes with percent signs."""
    begin = squeezed(rest[:FILE_MAX])
    if MARKUP.match(begin) and (claimed or "<svg" in begin.lower()):
        return True
    if begin.startswith(("PNG", "ÿØÿ", "GIF8", "RIFF", "\ufffdPNG")):
        return True
    unbroken, run = RAW.match(rest, 0, FILE_MAX), RAW.match(begin)
    assert unbroken is not None and run is not None
    return claimed and (_is_payload(unbroken[0]) or (len(run[0]) > STAND_IN_MAX and not _is_prose(run[0])))


def _is_payload(run: str) -> bool:
    """Say whether what directly follows the comma is content rather than a word in its place."""
    stands_in = len(run) <= STAND_IN_MAX and (_is_prose(run) or STAND_IN.search(run) is not None)
    return len(run) >= 4 and not stands_in


def _is_prose(run: str) -> bool:
    return sum(map(str.islower, run[:64])) >= PROSE * len(run[:64])


def has_packed_image(text: str) -> bool:
    """Say whether a text holds an image file as base64, hexadecimal digits or base85."""
    if len(text) < LEAST:
        return False
    squeezed_text = squeezed(text)
    hits = iter(range(MAX_HITS))
    for found in (
        _in_base64(text, hits, broken=False),
        _in_base64(squeezed_text, hits, broken=True),
        _in_hexadecimal(squeezed_text, hits),
        _in_base85(squeezed_text, hits),
    ):
        if any(found):
            return True
    return next(hits, None) is None


def _in_base64(text: str, hits: Iterator[int], *, broken: bool) -> Iterator[bool]:
    if "-" in text or "_" in text:
        text = text.translate(STANDARD)
    for begin, before in BASE64:
        for place in _places(text, begin, hits):
            run = UNBROKEN.match(text, place - before, place - before + 4 * LEAST) if place >= before else None
            if run and len(run[0]) >= 4 * LEAST // 3 and not (broken and _is_prose(run[0][len(begin) :])):
                yield is_image(_from_base64(run[0]))


def _in_hexadecimal(text: str, hits: Iterator[int]) -> Iterator[bool]:
    text = text.lower()
    for mark in ("0x", "\\x", ",", ":", ";", "'", '"'):
        if mark in text:
            text = text.replace(mark, "")
    for begin, before in HEXADECIMAL:
        for place in _places(text, begin, hits):
            digits = text[max(0, place - before) : place - before + 2 * LEAST]
            if len(digits) == 2 * LEAST and DIGITS.fullmatch(digits):
                yield is_image(bytes.fromhex(digits))
    yield HEX_BITMAP.search(text) is not None


def _in_base85(text: str, hits: Iterator[int]) -> Iterator[bool]:
    for begin, before, decode in BASE85:
        for place in _places(text, begin, hits):
            packed = text[max(0, place - before) : place - before + 5 * ((LEAST + 3) // 4)]
            try:
                yield len(packed) * 4 // 5 >= LEAST and is_image(decode(packed))
            except ValueError:  # other text
                continue


def _places(text: str, begin: str, hits: Iterator[int]) -> Iterator[int]:
    """Yield where a text holds a beginning, as long as there are hits left."""
    place = text.find(begin)
    while place >= 0 and next(hits, None) is not None:
        yield place
        place = text.find(begin, place + 1)


def _from_base64(packed: str) -> bytes:
    """Decode the beginning of base64, as far as it is."""
    packed = packed.translate(STANDARD).partition("=")[0][: FILE_MAX // 3 * 4]
    try:
        return base64.b64decode(packed[: len(packed) // 4 * 4] + _rest(packed))
    except binascii.Error:
        return b""


def _rest(packed: str) -> str:
    left = len(packed) % 4
    return "" if left < 2 else packed[-left:] + "=" * (4 - left)


def _from_z85(packed: str) -> bytes:
    return base64.b85decode(packed.translate(FROM_Z85))


def _base64_beginnings() -> Iterator[tuple[str, int]]:
    """Yield what base64 of a file begins with, and how many characters stand before."""
    for magic in (*MAGIC, b"\xff\xd8\xff"):
        yield base64.b64encode(magic).decode()[: len(magic) * 8 // 6], 0
    yield "Z0eX", 6  # "ftyp" after the four bytes of a size
    for size in "0123":
        yield f"Qk{size}", 0


def _base85_beginnings() -> Iterator[tuple[str, int, Callable[[str], bytes]]]:
    """Yield the same for base85 and what decodes it; four bytes are five characters."""
    for encode, decode in (
        (base64.b85encode, base64.b85decode),
        (base64.a85encode, base64.a85decode),
        (lambda content: base64.b85encode(content).translate(TO_Z85), _from_z85),
    ):
        for begin in sorted({encode(b"\xff\xd8\xff" + bytes([marker])).decode()[:3] for marker in MARKERS}):
            yield begin, 0, decode
        for magic in MAGIC[:COMMON]:
            yield encode(magic[: len(magic) // 4 * 4]).decode(), 0, decode
        yield encode(b"ftyp").decode(), 5, decode


BASE64 = tuple(_base64_beginnings())
BASE85 = tuple(_base85_beginnings())
HEXADECIMAL = (*((magic.hex(), 0) for magic in (*MAGIC, b"\xff\xd8\xff")), (b"ftyp".hex(), 8))
HEX_BITMAP = re.compile(r"424d[0-9a-f]{8}0{8}[0-9a-f]{8}(?:0c|28|34|38|40|6c|7c)0{6}")
DIGITS = re.compile(r"[0-9a-f]*")
