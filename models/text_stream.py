"""The text of an answer while its tokens come in; light, for every runtime."""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["TextStream"]

UNFINISHED = "\ufffd"
"""What a decoder writes for bytes that are not a whole character yet."""


class TextStream:
    """The text of a growing answer: what a new token adds to it, no sooner than whole characters are there."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._told = ""

    def add(self, token: int) -> str:
        """Return the text that became certain with one more token; blanks before the first word are left out."""
        self._ids.append(token)
        text = self._decode(self._ids).lstrip()
        if text.endswith(UNFINISHED) or not text.startswith(self._told):
            return ""
        return self._tell(text.rstrip())

    def end(self) -> str:
        """Return what is left to tell."""
        return self._tell(self._decode(self._ids).strip())

    def _tell(self, text: str) -> str:
        more = text[len(self._told) :] if text.startswith(self._told) else ""
        self._told += more
        return more
