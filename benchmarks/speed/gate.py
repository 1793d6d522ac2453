"""Measure the gate beside its alternatives: time to a block, time added to an answer, forward passes.

Ways: ``no guard`` (an answer and nothing else), ``published`` (a whole forward pass for the guard, then the answer from
the start), ``exact alone`` (a gate without a standalone guard: both from one prefill) and ``gate``. All run in one
process of their own and take turns; see ``benchmarks.speed.gate_ways``. This module loads no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.speed.isolation import run_isolated
from benchmarks.speed.peer import Subject
from safevlm.errors import InputError, SafeVLMError
from safevlm.machine import core_count, machine_name
from safevlm.terminal.commandline import printable

__all__ = ["GateOptions", "GateRow", "GateSpeed", "gate_table", "measure_gate"]

BASELINE = ("no guard", "answer")


@dataclass(frozen=True, kw_only=True)
class GateOptions:
    """Every way runs ``repeats`` times in each of so many ``rounds``, answering with at most ``max_new_tokens``."""

    rounds: int = 3
    repeats: int = 3
    max_new_tokens: int = 8
    threads: int = field(default_factory=core_count)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rounds", "repeats", "max_new_tokens", "threads"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)} is not allowed. Give at least 1.")


@dataclass(frozen=True, kw_only=True)
class GateRow:
    """One way on one course (``block``, ``answer``, either after ``unsure``).

    Milliseconds: ``median_ms`` of the rounds' medians, ``spread_ms`` between the lowest and highest of them.
    ``added_ms`` is over an answer without a guard, None for a block. ``passes`` counts runs of the standalone guard
    and the vision tower, and of the language model over many positions (prefill) and one (decode).
    """

    way: str
    course: str
    median_ms: float
    spread_ms: float | None
    added_ms: float | None
    passes: Mapping[str, int]
    runs: int


@dataclass(frozen=True, kw_only=True)
class GateSpeed:
    """All that was measured; ``model`` is what the process said of its model and guard."""

    subject: Subject
    options: GateOptions
    model: Mapping[str, Any]
    rows: tuple[GateRow, ...]


def measure_gate(subject: Subject, options: GateOptions, *, bundle: Path | None = None) -> GateSpeed:
    """Measure on ``subject`` with the guard in ``bundle``, or one of its size that is exported for the purpose.

    Raises InputError for a subject or bundle that cannot be used; SafeVLMError when the process fails.
    """
    request = {"subject": asdict(subject), "bundle": None if bundle is None else str(bundle), **asdict(options)}
    outcome = run_isolated("benchmarks.speed.gate_ways:measure", request, threads=options.threads)
    if outcome.problem is not None:
        kind = InputError if outcome.exit_code == InputError.exit_code else SafeVLMError
        raise kind(outcome.problem)
    model, *answers = outcome.answers
    return GateSpeed(subject=subject, options=options, model=model, rows=summed_up(answers))


def summed_up(answers: list[Mapping[str, Any]]) -> tuple[GateRow, ...]:
    """Return a row for each way and course, in the order in which they first came."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for answer in answers:
        found.setdefault((answer["way"], answer["course"]), []).append(answer)
    medians = {key: [float(np.median(answer["times_ms"])) for answer in rounds] for key, rounds in found.items()}
    baseline = float(np.median(medians[BASELINE]))
    rows = []
    for (way, course), rounds in found.items():
        own = medians[way, course]
        median = float(np.median(own))
        rows.append(
            GateRow(
                way=way,
                course=course,
                median_ms=median,
                spread_ms=max(own) - min(own) if len(own) > 1 else None,
                added_ms=median - baseline if course.endswith("answer") else None,
                passes=rounds[0]["passes"],
                runs=sum(len(answer["times_ms"]) for answer in rounds),
            )
        )
    return tuple(rows)


def gate_table(speed: GateSpeed) -> list[str]:
    """Return the lines of a table."""
    subject, model = speed.subject, speed.model
    weights = f", random weights, {model['language_layers']} language-model layers" if subject.random else ""
    lines = [
        f"gate before {printable(subject.name)}{weights}, guard's head {model['head']}",
        f"{model['height']}x{model['width']} pixels, prompt of {model['prompt_tokens']} tokens, at most "
        f"{speed.options.max_new_tokens} new ones, {machine_name()}, {speed.options.threads} threads",
        "",
    ]
    head = ("way", "course", "median ms", "spread ms", "added ms", "guard", "vision", "prefill", "decode", "runs")
    rows: list[tuple[str, ...]] = [head, *map(_cells, speed.rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for cells in rows:
        padded = [
            cell.ljust(width) if at < 2 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return lines


def _cells(row: GateRow) -> tuple[str, ...]:
    passes = row.passes
    return (
        row.way,
        row.course,
        f"{row.median_ms:.2f}",
        "-" if row.spread_ms is None else f"{row.spread_ms:.2f}",
        "-" if row.added_ms is None else f"{row.added_ms:+.2f}",
        *(str(passes[name]) for name in ("guard", "vision", "prefill", "decode")),
        str(row.runs),
    )
