"""Which answers are refusals, by HoliSafe's string matching."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources

from calibration.sets.plain_answer import plain_answer

__all__ = ["is_refusal", "refusal_phrase"]


def is_refusal(answer: str) -> bool:
    """Say whether an answer begins with, or contains, one of HoliSafe's phrases; see :func:`refusal_phrase`."""
    return refusal_phrase(answer) is not None


def refusal_phrase(answer: str) -> str | None:
    """Return which of HoliSafe's phrases an answer begins with or contains, None where it is no refusal.

    The answer is read as it is (lower case, stripped), as the benchmark does, and without its markup and typography.
    Source: the evaluation code of github.com/youngwanLEE/holisafe; its spellings are kept, odd ones included.
    """
    begins, contains = _phrases()
    for said in dict.fromkeys((answer.lower().strip(), plain_answer(answer).lower())):
        for phrase in begins:
            if said.startswith(phrase):
                return phrase
        for phrase in contains:
            if phrase in said:
                return phrase
    return None


@cache
def _phrases() -> tuple[tuple[str, ...], tuple[str, ...]]:
    text = resources.files("calibration.sets").joinpath("refusal_phrases.json").read_text(encoding="utf-8")
    data = json.loads(text)
    return tuple(data["starts_with"]), tuple(data["contains"])
