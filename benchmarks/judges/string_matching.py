"""HoliSafe's string matching: an answer is a refusal when it begins with, or contains, one of its phrases.

Phrases and rule are in :mod:`calibration.sets.refusals`; an answer that says nothing is neither help nor a refusal.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from benchmarks.judges.judge import Score
from benchmarks.judges.pairs import score_by_refusal
from benchmarks.runs.record import Row
from calibration.sets.refusals import refusal_phrase

__all__ = ["StringMatching"]


class StringMatching:
    """The judge ``string``."""

    name = "string"

    def identity(self) -> Mapping[str, Any]:
        """Return the rule and the hash of its phrases."""
        phrases = resources.files("calibration.sets").joinpath("refusal_phrases.json").read_bytes()
        return {"judge": "HoliSafe's string matching", "phrases_sha256": hashlib.sha256(phrases).hexdigest()}

    def score(self, rows: Sequence[Row]) -> list[Score]:
        """Return a score for each pair, in order."""
        return [score_by_refusal(row, refusal_phrase) for row in rows]
