"""Bytes of a text file that somebody else's program wrote, as text."""

from __future__ import annotations

import codecs

from safevlm.errors import InputError

__all__ = ["decode_text"]

MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16's, which it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
SEEN = 400
"""Bytes by which text without a mark is recognised."""
BINARY = (
    (b"PK\x03\x04", "an Excel or OpenDocument workbook, or another ZIP file"),
    (b"\xd0\xcf\x11\xe0", "an old Excel workbook"),
    (b"PAR1", "a Parquet file"),
    (b"\x1f\x8b", "compressed with gzip"),
)


def decode_text(content: bytes, where: str) -> str:
    """Return UTF-8 text, or UTF-16 or UTF-32 as a byte order mark says (Excel's "Unicode text"), without the mark.

    Raises: InputError, beginning with ``where``, for other bytes: a workbook, or a line in another code page.
    """
    for start, what in BINARY:
        if content.startswith(start):
            raise InputError(f"{where} is {what}, not text. Open it and save it as text: CSV UTF-8, or JSON.")
    mark, encoding = next((each for each in MARKS if content.startswith(each[0])), (b"", _without_mark(content)))
    try:
        return content[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        if encoding != "utf-8":
            raise InputError(f"{where} is not {encoding.upper()} text ({error.reason}). Save it as UTF-8.") from error
        at = len(mark) + error.start
        line = 1 + content.count(b"\n", 0, at)
        byte = content[at : at + 1]
        western = byte.decode("cp1252", "replace")
        raise InputError(
            f"{where} is not UTF-8 text: line {line} holds the byte 0x{byte.hex().upper()} ({western!r} in "
            "Windows-1252). Save it as UTF-8; in Excel, choose 'CSV UTF-8'."
        ) from error


def _without_mark(content: bytes) -> str:
    """Return the encoding of bytes without a mark: mostly ASCII in UTF-16 has a zero in every other byte."""
    for start, encoding in ((1, "utf-16-le"), (0, "utf-16-be")):
        half = content[start:SEEN:2]
        if 2 * half.count(0) > len(half):
            return encoding
    return "utf-8"
