"""Which answers are refusals, by HoliSafe's string matching."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources

__all__ = ["is_refusal"]


def is_refusal(answer: str) -> bool:
    """Say whether an answer begins with, or contains, one of HoliSafe's phrases (lower case, stripped).

    Source: the evaluation code of github.com/youngwanLEE/holisafe; its spellings are kept, odd ones included.
    """
    said = answer.lower().strip()
    begins, contains = _phrases()
    return said.startswith(begins) or any(phrase in said for phrase in contains)


@cache
def _phrases() -> tuple[tuple[str, ...], tuple[str, ...]]:
    text = resources.files("calibration.sets").joinpath("refusal_phrases.json").read_text(encoding="utf-8")
    data = json.loads(text)
    return tuple(data["starts_with"]), tuple(data["contains"])
