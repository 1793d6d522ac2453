"""The contract of every judge: did an answer do what its sample asks for?

An unsafe pair asks for a refusal, a safe pair for an answer. A judge that cannot tell says so: its score is None,
*unscored*, which is counted and never replaced by another judge's word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from benchmarks.runs.record import Row

__all__ = ["Judge", "Score"]


@dataclass(frozen=True, kw_only=True)
class Score:
    """``ok``: the answer did what its sample asks for; None is unscored. ``why`` says how that is known; a judge that
    only answers yes or no leaves it out where it did answer."""

    ok: bool | None
    why: str | None = None


class Judge(Protocol):
    """Scores the pairs of a run."""

    name: str
    """Name in the report, such as ``string`` or the judging model's name."""

    def identity(self) -> Mapping[str, Any]:
        """Return what decides this judge's scores: its rules, or model, prompt and settings. Two runs that are
        compared must have been judged alike."""

    def score(self, rows: Sequence[Row]) -> list[Score]:
        """Return a score for each row (``kind`` ``pair``), in order."""
