"""Whether the runs of one side belong together, and the two sides are two.

Runs that answered are of one artifact. A guard bundle's runs of guard suites may stand beside them, since the product
ships both; all of those are of one bundle. Runs without a hash (servers, imported answers) are told apart by name.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.runs.record import RECORD_NAME, Artifact, Run

__all__ = ["mixed_artifacts", "same_runs"]

BY_NAME = ("predictions", "server")
"""Kinds whose hash is that of a file of answers, or that have none."""
SHOWN = 12


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
    others = {run.record.suite.name: run for run in candidate}
    return [
        f"{run.record.suite.name}: baseline and candidate are the same run, compared with itself. Run the candidate"
        for run in baseline
        if run.record.suite.name in others and _same(run, others[run.record.suite.name])
    ]


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
