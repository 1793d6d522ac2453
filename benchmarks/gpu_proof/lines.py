"""The file of lines: one JSON object a step, appended as it ends, and which steps it leaves to do."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks.gpu_proof.finding import FAILED, PROVED, UNPROVED
from benchmarks.gpu_proof.steps import Step
from benchmarks.speed.isolation import Outcome
from safevlm.errors import InputError
from safevlm.machine import now

__all__ = ["LATE", "PARTLY", "Line", "append", "is_done", "latest", "line_of", "read_lines", "still_to_do"]

Line: TypeAlias = Mapping[str, Any]
LATE, PARTLY = "late", "partly proved"
AGAIN = (None, LATE, UNPROVED, PARTLY)
"""In which order steps are taken up: those never tried first."""
NEEDED = {
    "step",
    "title",
    "outcome",
    "seconds",
    "problem",
    "findings",
    "created",
    "machine",
    "gpu",
    "driver",
    "versions",
}
NEEDED |= {"dry", "wheels"}


def line_of(step: Step, outcome: Outcome, here: Mapping[str, Any], *, seconds: float, deadline: float) -> Line:
    """Return the line of a step that has ended; ``here`` are the surroundings, which it repeats."""
    findings = list(outcome.answers)
    return {
        "step": step.name,
        "title": step.title,
        "outcome": _outcome(outcome),
        "seconds": round(seconds, 1),
        "deadline_seconds": round(deadline, 1),
        "problem": outcome.problem,
        "findings": findings,
        "said": "" if outcome.problem is None and all(each["outcome"] != FAILED for each in findings) else outcome.said,
        "created": now(),
        **here,
    }


def _outcome(outcome: Outcome) -> str:
    """Return what became of a whole step."""
    counted = Counter(each["outcome"] for each in outcome.answers)
    if outcome.late:
        return LATE
    if outcome.problem is not None and outcome.exit_code == InputError.exit_code:
        counted[UNPROVED] += 1
    elif outcome.problem is not None:
        return FAILED
    if counted[FAILED]:
        return FAILED
    if not counted[UNPROVED]:
        return PROVED
    return PARTLY if counted[PROVED] else UNPROVED


def read_lines(path: Path) -> list[Line]:
    """Return the lines of a file, none where there is no file; a last line that was cut off is left out.

    Raises InputError for a file that holds something else.
    """
    if not path.is_file():
        return []
    try:
        there = path.read_text(encoding="utf-8").splitlines(keepends=True)
        found = [json.loads(line) for line in there if line.endswith("\n")]
        for line in found:
            if not line.keys() >= NEEDED:
                raise ValueError(f"no {', '.join(sorted(NEEDED - line.keys()))}")
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path} does not hold the lines of a proof ({error}). Give another --out.") from error
    return found


def append(path: Path, line: Line) -> None:
    """Add a line to a file, on the disk when this returns; the remains of one that was cut off go."""
    there = path.read_bytes() if path.is_file() else b""
    with path.open("ab") as stream:
        stream.truncate(there.rfind(b"\n") + 1)
        stream.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


def latest(lines: Sequence[Line]) -> dict[str, Line]:
    """Return the last line of each step."""
    return {str(line["step"]): line for line in lines}


def is_done(line: Line, here: Mapping[str, Any]) -> bool:
    """Say whether a step need not be run again here.

    It need not when it ended on this GPU, and nothing that it lacked has come since: no other wheels.
    """
    if line["gpu"] != here["gpu"] or line["dry"] != here["dry"] or line["outcome"] == LATE:
        return False
    return line["outcome"] in (PROVED, FAILED) or line["wheels"] == here["wheels"]


def still_to_do(steps: Sequence[Step], lines: Sequence[Line], here: Mapping[str, Any]) -> list[Step]:
    """Return the steps that are left, those never tried first, then those that were late, then those that lacked."""
    last = latest(lines)
    left = [step for step in steps if step.name not in last or not is_done(last[step.name], here)]

    def rank(step: Step) -> int:
        outcome = last[step.name]["outcome"] if step.name in last else None
        return AGAIN.index(outcome) if outcome in AGAIN else 0

    return sorted(left, key=rank)
