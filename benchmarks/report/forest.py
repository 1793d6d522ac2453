"""A line's interval as a bar beside its margin: where a forest plot stands in the table.

Each bar is drawn in units of its own margin, and turned so that worse is right: zero and margin stand at the same
place in every row, whatever the margins are, and a bar that ends left of the margin is proof.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.comparison.findings import Line

__all__ = ["HEIGHT", "WIDTH", "Bar", "Scale", "scale_of"]

WIDTH, HEIGHT = 180.0, 26.0
"""Of the drawing, in its own units."""
INSET = 7.0
"""Left free at both ends, for the arrow of a bar that goes on."""
FARTHEST = 4.0
"""Margins that are shown to the right; what reaches farther ends in an arrow."""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """Where things stand, in the drawing's units: ends of the interval, the change itself, zero and margin.

    ``cut_left`` and ``cut_right`` say that the interval goes on; ``dot`` is None where the change lies outside.
    """

    low: float
    high: float
    dot: float | None
    zero: float
    margin: float
    cut_left: bool
    cut_right: bool


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Which part of the axis is shown, in margins; worse is positive."""

    low: float
    high: float

    def place(self, worsening: float) -> float:
        """Return x of a worsening in margins, kept inside."""
        inside = min(max(worsening, self.low), self.high)
        return round(INSET + (WIDTH - 2 * INSET) * (inside - self.low) / (self.high - self.low), 2)

    def bar(self, line: Line) -> Bar | None:
        """Return a line's bar, None without a margin or an interval."""
        spread = _worsening(line)
        if spread is None:
            return None
        low, middle, high = spread
        return Bar(
            low=self.place(low),
            high=self.place(high),
            dot=self.place(middle) if self.low <= middle <= self.high else None,
            zero=self.place(0),
            margin=self.place(1),
            cut_left=low < self.low,
            cut_right=high > self.high,
        )


def scale_of(lines: Sequence[Line]) -> Scale:
    """Return a scale that shows zero, margin and as much of the intervals as leaves both legible."""
    spreads = [spread for spread in map(_worsening, lines) if spread is not None]
    lowest = min((low for low, _, _ in spreads), default=-1.0)
    highest = max((high for _, _, high in spreads), default=2.0)
    return Scale(low=max(min(lowest, -1.0), -FARTHEST / 2), high=min(max(highest, 1.75), FARTHEST))


def _worsening(line: Line) -> tuple[float, float, float] | None:
    """Return low end, middle and high end of how much worse, in margins.

    The high end is the largest of the bounds that decide, so that what ends left of the margin is proven.
    """
    if line.margin is None or line.interval is None:
        return None
    sign = (1 if line.lower_is_better else -1) / line.margin
    low, high = sorted((sign * line.interval[0], sign * line.interval[1]))
    if line.bounds:
        high = max(bound.upper for bound in line.bounds) / line.margin
    return min(low, high), sign * line.change, high
