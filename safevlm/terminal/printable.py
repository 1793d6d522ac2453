"""Text out of files as it may be shown: nothing in it moves the cursor, colours the terminal or hides."""

from __future__ import annotations

import re

__all__ = ["is_plain", "one_line", "printable", "shortened"]

INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
"""Letters and marks that show nothing, which ``str.isprintable`` lets pass (Unicode's Default_Ignorable_Code_Point
and the blank Braille pattern); control, bidi, zero-width, surrogate and unassigned code points it does not."""


def is_plain(text: str) -> bool:
    """Say whether every character shows as itself: no line breaks, control, bidi or invisible characters."""
    return text.isprintable() and INVISIBLE.search(text) is None


def one_line(text: str) -> str:
    r"""Escape every character that is not plain, line breaks included: ``\x1b``, ``\u202e``, ``\n``."""
    if is_plain(text):
        return text
    return "".join(sign if is_plain(sign) else _escaped(sign) for sign in text)


def printable(text: str) -> str:
    """Escape as :func:`one_line` does, but keep line breaks: for text of several lines."""
    return "\n".join(map(one_line, text.split("\n")))


def shortened(text: str, limit: int = 80) -> str:
    """Return text out of a file for a message: escaped, and cut after ``limit`` characters."""
    shown = one_line(text[: limit + 1])
    return shown if len(text) <= limit and len(shown) <= 2 * limit else f"{shown[:limit]}…"


def _escaped(sign: str) -> str:
    return sign.encode("unicode_escape", "backslashreplace").decode("ascii")
