"""Precisions that a checkpoint's numbers do not fit: a bundle is completed without them, and the user is told why."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from safevlm.errors import PrecisionError

__all__ = ["LeftOut"]


class LeftOut:
    """What is left out of a bundle that was asked for in several precisions, beside INT8."""

    def __init__(self, asked: Iterable[str]) -> None:
        self.asked = set(asked)
        self._reasons: dict[str, str] = {}

    def add(self, precision: str, reason: str) -> None:
        """Leave a precision out. Raises: PrecisionError when that was the last of those asked for."""
        self._reasons[precision] = f"precision {precision} was left out: {reason.rstrip('.')}."
        if self.asked <= self._reasons.keys():
            raise PrecisionError(f"{self} Nothing was exported: give --precision fp32.")

    def report(self, out: Path, files: Iterable[str]) -> None:
        """Raise PrecisionError that says what the bundle at ``out`` lacks, if it lacks anything."""
        if self._reasons:
            raise PrecisionError(
                f"{self} The bundle in {out} is complete with {', '.join(files)}: use that.",
                left_out=tuple(self._reasons),
            )

    def __str__(self) -> str:
        return " ".join(self._reasons.values())
