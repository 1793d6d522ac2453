"""Findings: what a step claims, whether that was shown, and what was measured on the way.

A step is a function from a request to an iterator of findings, all JSON, which ``benchmarks.speed.isolation`` runs.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from safevlm.errors import EngineUnavailableError, InputError

__all__ = ["FAILED", "PROVED", "UNPROVED", "Finding", "Task", "attempt", "checked", "failed", "proved", "unproved"]

Finding: TypeAlias = Mapping[str, Any]
"""``claim``, ``outcome``, ``measured`` in words, ``reason`` where it is not proved, and ``figures`` by name."""
Outcome = Literal["proved", "failed", "not proved"]
PROVED: Outcome = "proved"
FAILED: Outcome = "failed"
UNPROVED: Outcome = "not proved"


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a step is given: torch's device, whether it is a dry run, and the folder to write to, which it may reuse."""

    device: str
    dry: bool
    work: Path

    @staticmethod
    def of(request: Mapping[str, Any]) -> Task:
        """Return the task that a request states."""
        return Task(device=request["device"], dry=request["dry"], work=Path(request["work"]))


def proved(claim: str, measured: str = "", **figures: Any) -> Finding:
    """Return that a claim holds."""
    return _finding(claim, PROVED, measured, None, figures)


def failed(claim: str, reason: str, measured: str = "", **figures: Any) -> Finding:
    """Return that a claim does not hold."""
    return _finding(claim, FAILED, measured, reason, figures)


def unproved(claim: str, reason: str) -> Finding:
    """Return that a claim could not be tried here, and what was lacking."""
    return _finding(claim, UNPROVED, "", reason, {})


def checked(claim: str, holds: bool, measured: str, **figures: Any) -> Finding:
    """Return that a claim holds or not, by what was measured."""
    return proved(claim, measured, **figures) if holds else failed(claim, "it does not hold", measured, **figures)


def _finding(
    claim: str, outcome: Outcome, measured: str, reason: str | None, figures: Mapping[str, Any]
) -> dict[str, Any]:
    held = {name: value if _fits_json(value) else str(value) for name, value in figures.items()}
    return {"claim": claim, "outcome": outcome, "measured": measured, "reason": reason, "figures": held}


def _fits_json(value: object) -> bool:
    """Say whether JSON can hold a value: infinity and NaN are measured, too, and it cannot hold those."""
    return not isinstance(value, float) or math.isfinite(value)


def attempt(claim: str, call: Callable[..., Iterable[Finding]], *given: Any) -> Iterator[Finding]:
    """Yield what ``call`` finds; its exception becomes a finding, so that one claim never ends a step.

    What the machine lacks (InputError, EngineUnavailableError) leaves the claim unproved; every other exception is a
    failure, whose traceback goes to standard error.
    """
    try:
        yield from call(*given)
    except (InputError, EngineUnavailableError) as error:
        yield unproved(claim, str(error))
    except Exception as error:
        traceback.print_exc()
        yield failed(claim, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
