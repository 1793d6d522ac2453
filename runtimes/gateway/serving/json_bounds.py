"""Bound a JSON text before it is parsed: ``[],`` repeated makes 8 MB of text 700 MB of objects.

Everything here is a handful of passes in C over the bytes: some 30 ms for a body of 32 MB.
"""

from __future__ import annotations

import re
from itertools import accumulate

__all__ = ["JsonSizeError", "check_json"]

MAX_DIGITS = 400
"""Of a number's text: a double needs at most 309 before the point, and reading n digits takes n² steps."""
_DIGITS = re.compile(rb"[0-9.]{%d}" % (MAX_DIGITS + 1))
_STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_NO_BRACKETS = bytes(set(range(256)) - set(_STEPS))


class JsonSizeError(ValueError):
    """A JSON text has too many values, is nested too deeply, or holds a number that is too long."""


def check_json(content: bytes, *, nodes: int, depth: int) -> None:
    """Raise JsonSizeError for a text with more than ``nodes`` values or more than ``depth`` nested arrays and objects.

    A text that is not UTF-8, or no JSON, is not necessarily noticed here. Raises ValueError for one with a NUL byte,
    which JSON cannot hold and UTF-16 does: its quotes would be miscounted.
    """
    if b"\0" in content:
        raise ValueError("a NUL byte is not allowed in JSON")
    outside = _outside_strings(content, nodes)
    opened = outside.count(b"[") + outside.count(b"{")
    if opened + outside.count(b",") >= nodes:
        raise JsonSizeError(f"more than {nodes} values")
    if opened > depth:
        brackets = outside.translate(None, _NO_BRACKETS)
        if max(accumulate(map(_STEPS.__getitem__, brackets)), default=0) > depth:
            raise JsonSizeError(f"more than {depth} levels of nesting")
    if _DIGITS.search(outside):
        raise JsonSizeError(f"a number of more than {MAX_DIGITS} digits")


def _outside_strings(content: bytes, nodes: int) -> bytes:
    """Return what stands outside of the strings; a value has at most two of them, its key's and its own."""
    if b"\\" in content:
        content = content.replace(b"\\\\", b"").replace(b'\\"', b"")
    if content.count(b'"') > 4 * nodes:
        raise JsonSizeError(f"more than {nodes} values")
    return b"".join(content.split(b'"')[::2])
