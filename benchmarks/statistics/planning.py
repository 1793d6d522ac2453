"""What so many samples can prove, and how many samples a proof would need."""

from __future__ import annotations

import math
from statistics import NormalDist

from benchmarks.statistics.tango import critical_value, tango_interval
from safevlm.errors import InputError

__all__ = ["resolvable_margin", "samples_needed"]

_MOST = 10**9
"""Samples beyond which no plan is worth a number."""


def resolvable_margin(worse: int, better: int, n: int, *, confidence: float = 0.95, power: float = 0.8) -> float:
    """Return the smallest margin that n pairs prove with probability ``power`` if nothing changed on average.

    Both ways take equal parts of the changes that were seen. The difference then lies below its ``power`` quantile
    that often, and Tango's upper end there is the margin. Without any change that is the least n pairs can ever prove.
    """
    if not 0 < power < 1:
        raise InputError(f"power {power} is not allowed. Give a number above 0 and below 1, such as 0.8.")
    changed = float(worse + better)
    gap = min(NormalDist().inv_cdf(power) * math.sqrt(changed), changed) if power > 0.5 else 0.0
    return tango_interval((changed + gap) / 2, (changed - gap) / 2, n, confidence=confidence)[1]


def samples_needed(
    worse: int,
    better: int,
    n: int,
    margin: float,
    *,
    change: float | None = None,
    upper: float | None = None,
    confidence: float = 0.95,
) -> int | None:
    """Return about how many pairs bring the upper end of the worsening below ``margin`` if the rates stay.

    ``change`` is the worsening where it is no plain share of pairs (a mean over types), ``upper`` an upper end that
    another method found at n pairs; its distance is taken to shrink with the root. None where the worsening itself
    reaches the margin, or no attainable number would do.
    """
    difference = (worse - better) / n if change is None else change
    if difference >= margin:
        return None
    critical_value(confidence)
    needed = _by_tango(max((worse + better) / n, abs(difference)), difference, margin, confidence)
    if needed is not None and upper is not None and upper > difference:
        needed = max(needed, math.ceil(n * ((upper - difference) / (margin - difference)) ** 2))
    return needed if needed is None or needed <= _MOST else None


def _by_tango(changed: float, difference: float, margin: float, confidence: float) -> int | None:
    """Halve the span in which the first number of pairs lies that does; ``changed`` is a share of pairs."""

    def enough(pairs: int) -> bool:
        up, down = (changed + difference) / 2 * pairs, (changed - difference) / 2 * pairs
        return tango_interval(up, down, pairs, confidence=confidence)[1] < margin

    high = 1
    while not enough(high):
        high *= 2
        if high > _MOST:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
