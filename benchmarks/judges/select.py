"""From a judge's name to the judge."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.judges.exact import ExactJudge
from benchmarks.judges.judge import Judge
from benchmarks.judges.logged import LogJudge
from benchmarks.judges.stored import BUILT_IN, StoredJudge, stored_judges
from benchmarks.judges.string_matching import StringMatching
from benchmarks.runs.record import Row
from safevlm.errors import InputError

__all__ = ["open_judge"]


def open_judge(name: str, run_folder: Path, rows: Sequence[Row] | None = None) -> Judge:
    """Return ``string``, ``exact``, ``log``, or the judge whose scores are stored in the run's folder under this name.

    Raises InputError that lists what there is, and with the run's ``rows`` for stored scores of another run.
    """
    if name == StringMatching.name:
        return StringMatching()
    if name == ExactJudge.name:
        return ExactJudge()
    if name == LogJudge.name:
        return LogJudge(run_folder)
    stored = stored_judges(run_folder)
    if name not in stored:
        raise InputError(
            f"unknown judge {name!r} for {run_folder}. Allowed: {', '.join((*BUILT_IN, *stored))}. To judge with a "
            f"language model: python -m benchmarks.judge --run {run_folder} --endpoint URL --judge-model M."
        )
    judge = StoredJudge(run_folder, name)
    if rows is not None:
        judge.check(rows)
    return judge
