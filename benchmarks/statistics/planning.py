"""What so many samples can prove, and how many samples a proof would need."""

from __future__ import annotations

import math
from statistics import NormalDist

from benchmarks.statistics.tango import one_sided_value, tango_bound
from safevlm.errors import InputError

__all__ = ["resolvable_margin", "samples_needed"]

_MOST = 10**9
"""Samples beyond which no plan is worth a number."""


def resolvable_margin(worse: int, better: int, n: int, *, confidence: float = 0.95, power: float = 0.8) -> float:
    """Return the smallest margin that n pairs prove with probability ``power`` if nothing changed on average.

    Both ways take equal parts of the changes that were seen. The difference then lies below its ``power`` quantile
    that often, and Tango's bound there is the margin. Without any change that is the least n pairs can ever prove.
    """
    if not 0 < power < 1:
        raise InputError(f"power {power} is not allowed. Give a number above 0 and below 1, such as 0.8.")
    changed = float(worse + better)
    gap = min(NormalDist().inv_cdf(power) * math.sqrt(changed), changed) if power > 0.5 else 0.0
    return tango_bound((changed + gap) / 2, (changed - gap) / 2, n, confidence=confidence)


def samples_needed(
    worse: int,
    better: int,
    n: int,
    margin: float,
    *,
    change: float | None = None,
    upper: float | None = None,
    confidence: float = 0.95,
    power: float = 0.8,
) -> int | None:
    """Return about how many pairs bring the bound of the worsening below ``margin`` with probability ``power`` if the
    rates seen are the true ones.

    ``change`` is the worsening where it is no plain share of pairs (a mean over types), ``upper`` a bound that another
    method found at n pairs; its distance is taken to shrink with the root. None where the worsening itself reaches the
    margin, or no attainable number would do.
    """
    difference = (worse - better) / n if change is None else change
    if difference >= margin:
        return None
    z = one_sided_value(confidence)
    needed = _by_tango(max((worse + better) / n, abs(difference)), difference, margin, confidence, power)
    if needed is not None and upper is not None and upper > difference:
        reach = (upper - difference) * (z + NormalDist().inv_cdf(power)) / z
        needed = max(needed, math.ceil(n * (reach / (margin - difference)) ** 2))
    return needed if needed is None or needed <= _MOST else None


def _by_tango(changed: float, difference: float, margin: float, confidence: float, power: float) -> int | None:
    """Halve the span in which the first number of pairs lies that does; ``changed`` is a share of pairs."""

    def enough(pairs: int) -> bool:
        """Whether the bound is below the margin at the ``power`` quantile of worse - better, counts being whole."""
        spread = math.sqrt(pairs * max(changed - difference**2, 0.0))
        gap = pairs * difference + NormalDist().inv_cdf(power) * spread
        seen = min(max(pairs * changed, abs(gap)), pairs)
        gap = min(max(gap, -seen), seen)
        return tango_bound((seen + gap) / 2, (seen - gap) / 2, pairs, confidence=confidence) < margin

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
