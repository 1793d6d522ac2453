"""The text of an answer while its tokens come in; light, for every runtime."""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["TextStream"]

UNFINISHED = "\ufffd"
"""What a decoder writes for bytes that are not a whole character yet."""


class TextStream:
    """The text of a growing answer: what a new token adds to it, no sooner than whole characters are there."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stops = stops
        self.stopped = False
        """Whether one of ``stops`` was found; no text from its beginning on is reported."""
        self._ids: list[int] = []
        self._told = ""

    def add(self, token: int) -> str:
        """Return the text that became certain with one more token; blanks before the first word are left out."""
        self._ids.append(token)
        text = self._decode(self._ids).lstrip()
        at = self._stop_in(text.rstrip(UNFINISHED))
        if at is not None:
            return self._tell(text[:at].rstrip())
        if text.endswith(UNFINISHED) or not text.startswith(self._told):
            return ""
        return self._tell(text[: len(text) - self._begun_stop(text)].rstrip())

    def end(self) -> str:
        """Return what is left to tell."""
        text = self._decode(self._ids).lstrip()
        return self._tell(text[: self._stop_in(text)].rstrip())

    def _stop_in(self, text: str) -> int | None:
        """Return where the stop begins that is whole first."""
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        self.stopped = self.stopped or bool(found)
        return min(found)[1] if found else None

    def _begun_stop(self, text: str) -> int:
        """Return how many letters at the text's end may become a stop."""
        longest = max(map(len, self._stops), default=1) - 1
        sizes = range(min(longest, len(text)), 0, -1)
        return next((size for size in sizes if any(each.startswith(text[-size:]) for each in self._stops)), 0)

    def _tell(self, text: str) -> str:
        more = text[len(self._told) :] if text.startswith(self._told) else ""
        self._told += more
        return more
