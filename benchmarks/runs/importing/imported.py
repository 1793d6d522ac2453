"""The run that a file of others' answers is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.runs.record import Artifact, Row, Run, RunRecord, Runtime, SuiteRecord
from runtimes.guard.bundle import sha256_of
from safevlm.machine import now

__all__ = ["imported_run"]


def imported_run(path: Path, name: str, suite: SuiteRecord, rows: Sequence[Row]) -> Run:
    """Return the finished run of the model ``name``, not in a folder yet; its prompt and settings are not known."""
    moment = now()
    record = RunRecord(
        created=moment,
        finished=moment,
        artifact=Artifact(name=name, kind="predictions", sha256=sha256_of(path)),
        runtime=Runtime(name="imported"),
        suite=suite,
    )
    return Run(folder=Path(), record=record, rows=tuple(rows))
