"""Whether the runs of one side belong together, and the two sides are two that have anything to do with each other.

Runs that answered are of one artifact. A guard bundle's runs of guard suites may stand beside them, since the product
ships both; all of those are of one bundle. Runs without a hash (servers, imported answers) are told apart by name.

A compressed model mostly refuses what its baseline refused, and its guard mostly gives the harms that it gave. Where
that does not hold, rows slipped or classes are in another order, however well the rates agree.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from benchmarks.comparison.measures import GuardRows, Judged
from benchmarks.judges.agreement import surely_below
from benchmarks.runs.record import RECORD_NAME, UNSAFE_TYPES, Artifact, Run
from runtimes.guard.verdict import blocks, harms, unsafe_probability

__all__ = ["mixed_artifacts", "same_runs", "unlike_sides"]

BY_NAME = ("predictions", "server")
"""Kinds whose hash is that of a file of answers, or that have none."""
SHOWN = 12
ALIKE = 0.1
"""Rates that differ by more have a line that says so."""
LIKE = 0.05
"""Kappa that related runs reach: two published models of different families have 0.4; with a judge that errs in
15 % of the answers, 0.1 is left."""


def mixed_artifacts(runs: Sequence[Run], side: str) -> list[str]:
    """Name the runs of a side that are not of the artifact that its first run is of."""
    told = []
    for alone in (False, True):
        own = [run.record for run in runs if (run.record.artifact.kind == "bundle") == alone]
        for record in own[1:]:
            differ = _difference(own[0].artifact, record.artifact)
            if differ is not None:
                told.append(
                    f"the {side}'s runs are of different artifacts ({own[0].suite.name} and {record.suite.name}): "
                    f"{differ}. Give runs of one artifact; --name distinguishes imported answers"
                )
    return told


def same_runs(baseline: Sequence[Run], candidate: Sequence[Run]) -> list[str]:
    """Name suites of which both sides are one and the same run, so that nothing is compared."""
    return [
        f"{run.record.suite.name}: baseline and candidate are the same run, compared with itself. Run the candidate"
        for run in baseline
        if any(run.record.suite.name == other.record.suite.name and _same(run, other) for other in candidate)
    ]


def unlike_sides(judged: Sequence[Judged], guard: GuardRows | None) -> list[str]:
    """Say where what the candidate does with a sample has nothing to do with what the baseline does with it."""
    told = []
    for own in judged:
        kinds, before, after = _words(own)
        if abs(int(before.sum()) - int(after.sum())) <= ALIKE * len(kinds) and surely_below(LIKE, before, after, kinds):
            told.append(
                f"by judge {own.judge}, which unsafe pairs the candidate refuses has nothing to do with which the "
                "baseline refuses. Check that each row holds the answer to its own question"
            )
    if guard is not None:
        both = (guard.labels > 0) & blocks(unsafe_probability(guard.before), guard.threshold)
        both &= blocks(unsafe_probability(guard.after), guard.threshold)
        before, after = (harms(probs[both].astype(np.float32), 0) for probs in (guard.before, guard.after))
        if surely_below(LIKE, before, after, np.zeros_like(before)):
            told.append(
                "the harms that the candidate's guard gives have nothing to do with those of the baseline's. Check the "
                "order of its classes, and that each row holds its own image's probabilities"
            )
    return told


def _words(own: Judged) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return type and what the judge says before and after, of unsafe pairs that it scored in both runs."""
    rows = [
        (UNSAFE_TYPES.index(str(pair.before.type)), bool(one.ok), bool(other.ok))
        for pair, one, other in zip(own.pairs, own.before, own.after, strict=True)
        if pair.before.type in UNSAFE_TYPES and None not in (one.ok, other.ok)
    ]
    kinds, before, after = np.array(rows, np.int64).reshape(-1, 3).T
    return kinds, before, after


def _same(one: Run, other: Run) -> bool:
    if (one.folder / RECORD_NAME).is_file() and one.folder.resolve() == other.folder.resolve():
        return True
    if one.rows != other.rows:
        return False
    if any(row.ms for row in one.rows):  # no two runs take the same time to the last digit
        return True
    first, second = one.record.artifact, other.record.artifact
    one_file = first.kind == second.kind == "predictions" and first.sha256 is not None and first.sha256 == second.sha256
    return one_file or (one.record.created, first) == (other.record.created, second)


def _difference(one: Artifact, other: Artifact) -> str | None:
    hashed = not {one.kind, other.kind} & set(BY_NAME)
    if hashed and None not in (one.sha256, other.sha256) and one.sha256 != other.sha256:
        return f"{one.name} ({str(one.sha256)[:SHOWN]}) and {other.name} ({str(other.sha256)[:SHOWN]})"
    if one.kind != "bundle" and _last(one.name) != _last(other.name):
        return f"{one.name} and {other.name}"
    for name in ("revision", "compression"):
        values = getattr(one, name), getattr(other, name)
        if None not in values and values[0] != values[1]:
            return f"{one.name} of {name} {values[0]} and {values[1]}"
    return None


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].casefold()
