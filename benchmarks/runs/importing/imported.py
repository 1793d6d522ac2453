"""The run that a file of others' answers is, and what is checked in every one of its rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.judges.string_matching import StringMatching
from benchmarks.runs.record import PAIR_TYPES, Artifact, Row, Run, RunRecord, Runtime, SuiteRecord
from runtimes.guard.bundle import sha256_of
from safevlm.errors import InputError
from safevlm.machine import now
from safevlm.terminal.printable import shortened

__all__ = ["answers_in", "distinct", "id_of", "imported_run", "number_of", "share_of", "suite_of", "type_of"]

SHOWN = 5


def imported_run(
    path: Path,
    name: str,
    suite: SuiteRecord,
    rows: Sequence[Row],
    *,
    scored_by: str | None = None,
    notes: Sequence[str] = (),
) -> Run:
    """Return the finished run of the model ``name``, not in a folder yet; its prompt and settings are not known."""
    moment = now()
    record = RunRecord(
        created=moment,
        finished=moment,
        artifact=Artifact(name=name, kind="predictions", sha256=sha256_of(path)),
        runtime=Runtime(name="imported"),
        suite=suite,
        scored_by=scored_by,
        notes=(*notes, *_against_string_matching(rows)),
    )
    return Run(folder=Path(), record=record, rows=tuple(rows))


def suite_of(name: str, rows: Sequence[Row], *, scored_by: str | None = None) -> SuiteRecord:
    """Return the suite that rows are of, whatever was answered; its hash covers what was asked and who scored it."""
    asked = sorted(map(_asked, rows))
    digest = hashlib.sha256(json.dumps([scored_by, asked]).encode()).hexdigest()
    return SuiteRecord(name=name, sha256=digest, rows=len(rows))


def distinct(found: Iterable[tuple[str, Row]], path: Path) -> list[Row]:
    """Return rows that come with their places. Raises InputError for an id that comes twice, or no row at all."""
    rows: dict[str, Row] = {}
    seen: dict[str, str] = {}
    for where, row in found:
        if row.id in rows:
            raise InputError(f"{where}: id {shortened(row.id)!r} is already in {seen[row.id]}. Give each sample once.")
        rows[row.id], seen[row.id] = row, where
    if not rows:
        raise InputError(f"{path} holds no samples.")
    return list(rows.values())


def id_of(value: Any, where: str, field: str) -> str:
    """Return a sample's id as text. Raises InputError where it is missing, empty, or neither text nor a number."""
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise InputError(
            f"{where}: {field} is {json.dumps(value, default=str)[:80]}. Give each sample an id of its own."
        )
    return str(value)


def type_of(value: Any, where: str, field: str) -> Any:
    """Return a pair's type. Raises InputError for any other word."""
    if value not in PAIR_TYPES:
        given = json.dumps(value, default=str)[:80]
        raise InputError(f"{where}: {field} is {given}. Allowed: {', '.join(PAIR_TYPES)}.")
    return value


def answers_in(responses: Any) -> int:
    """Count the texts among a sample's responses, however they are nested; a choice's log-likelihood, which lm-eval
    logs with whether it is the greedy one (``["-1.5", "False"]``), is none."""
    if isinstance(responses, str):
        return 1
    if not isinstance(responses, list) or _is_likelihood(responses):
        return 0
    return sum(map(answers_in, responses))


def _is_likelihood(responses: Sequence[Any]) -> bool:
    try:
        return len(responses) == 2 and responses[1] in ("True", "False") and float(responses[0]) <= 0
    except (TypeError, ValueError):
        return False


def number_of(value: Any) -> float | None:
    """Return what is a number, true and false included, as one."""
    return float(value) if isinstance(value, (int, float)) else None


def share_of(value: Any, where: str, what: str) -> float:
    """Return a score. Raises InputError unless it is a number from 0 to 1."""
    score = number_of(value)
    if score is None:
        raise InputError(f"{where}: {what} is {json.dumps(value, default=str)[:120]}; it must be a number from 0 to 1.")
    if not 0 <= score <= 1:  # false for NaN, too
        raise InputError(f"{where}: {what} gives {score:g}, but scores must be 0 to 1. Give another metric or column.")
    return score


def _against_string_matching(rows: Sequence[Row]) -> Iterator[str]:
    """Say where the log's own judge of pairs and string matching differ."""
    pairs = [row for row in rows if row.kind == "pair" and row.score is not None]
    if not pairs:
        return
    ours = StringMatching().score(pairs)
    differ = [row.id for row, own in zip(pairs, ours, strict=True) if own.ok is None or float(own.ok) != row.score]
    shown = ", ".join(differ[:SHOWN]) + (f" and {len(differ) - SHOWN} more" if len(differ) > SHOWN else "")
    where = f"; they differ on {shown}." if differ else "."
    alike = f"{len(pairs) - len(differ)} of {len(pairs)} pairs"
    yield f"The log's own judge (--judge log) and string matching agree on {alike}{where}"


def _asked(row: Row) -> str:
    fields: Mapping[str, Any] = row.model_dump(include={"id", "kind", "image", "query", "type", "reference"})
    return json.dumps(fields, sort_keys=True)
