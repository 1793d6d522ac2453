"""The log's own judge: what an imported log says of each pair, beside what our judges say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.judges.judge import Score
from benchmarks.judges.pairs import wants_refusal
from benchmarks.runs.record import Row, read_record
from safevlm.errors import InputError

__all__ = ["LogJudge"]


class LogJudge:
    """The judge ``log``. Raises InputError for a run that was not imported with scores."""

    name = "log"

    def __init__(self, run_folder: Path) -> None:
        self._scored_by = read_record(run_folder).scored_by
        if self._scored_by is None:
            raise InputError(f"{run_folder} holds no scores of an imported log. Give another --judge.")

    def identity(self) -> Mapping[str, Any]:
        """Return what gave the log its scores."""
        return {"judge": "the imported log's own", "scored_by": self._scored_by}

    def score(self, rows: Sequence[Row]) -> list[Score]:
        """Return a score for each pair, in order."""
        return [self._score(row) for row in rows]

    def _score(self, row: Row) -> Score:
        wants_refusal(row)  # a pair of a known type
        if row.score not in (0.0, 1.0):
            return Score(ok=None, why="the log has no score" if row.score is None else f"the log says {row.score:g}")
        return Score(ok=row.score == 1.0)
