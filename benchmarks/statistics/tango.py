"""Tango's score interval for the difference of two paired proportions.

Of n pairs, ``worse`` went from good to bad and ``better`` from bad to good; the difference is (worse - better) / n,
positive where things became worse. Source: Tango, Statistics in Medicine 17 (1998) 891-908, equations for the score
statistic under the restriction that the difference has a given value.

Counts may be fractions: planning asks what data would give.
"""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist

from safevlm.errors import InputError, MissingExtraError

__all__ = ["critical_value", "one_sided_value", "tango_bound", "tango_interval", "tango_z"]

_NORMAL = NormalDist()
_OFF = 1e-13
"""How far from the estimate the search begins: where nothing changed the estimate itself solves the equation, too."""
_SPARE = 0.1
"""Of a sample; see :func:`tango_bound`."""


def critical_value(confidence: float) -> float:
    """Return the normal quantile of a two-sided interval. Raises InputError outside 0 to 1."""
    return one_sided_value((1 + confidence) / 2) if confidence > 0 else one_sided_value(confidence)


def one_sided_value(confidence: float) -> float:
    """Return the normal quantile of a one-sided bound. Raises InputError outside 0 to 1."""
    if not 0 < confidence < 1:
        raise InputError(f"confidence {confidence} is not allowed. Give a number above 0 and below 1, such as 0.95.")
    return _NORMAL.inv_cdf(confidence)


def tango_z(worse: float, better: float, n: float, difference: float) -> float:
    """Return the score statistic of the data against a true ``difference``, -1 to 1; falls as that grows.

    Infinite where such data cannot come from that difference.
    """
    _check(worse, better, n)
    gap = worse - better - n * difference
    spread = math.sqrt(_variance(worse, better, n, difference))
    if spread > 0:
        return gap / spread
    return math.copysign(math.inf, gap) if gap else 0.0


@lru_cache(maxsize=65_536)
def tango_interval(worse: float, better: float, n: float, *, confidence: float = 0.95) -> tuple[float, float]:
    """Return the interval's lower and upper end, each in -1 to 1.

    Raises InputError for counts that are not counts of n pairs.
    """
    _check(worse, better, n)
    z = critical_value(confidence)
    return -_upper(better, worse, n, z), _upper(worse, better, n, z)


@lru_cache(maxsize=65_536)
def tango_bound(worse: float, better: float, n: float, *, confidence: float = 0.95) -> float:
    """Return the one-sided upper bound, in -1 to 1, that a proof of non-inferiority needs.

    It is the score interval's, with part of a sample more that became worse: counts are whole, and the plain bound of
    a handful lies below the truth in up to 6.6 % of cases instead of 5 (exact enumeration). The part makes the bound of
    data without a change the exact binomial one, and a tenth of a sample more keeps all tables at or below the level.

    Raises InputError for counts that are not counts of n pairs.
    """
    _check(worse, better, n)
    z, rare = one_sided_value(confidence), -math.log(1 - confidence)
    more = max(rare - z * math.sqrt(rare), 0.0) + _SPARE
    return _upper(min(worse + more, n - better), better, n, z)


def _check(worse: float, better: float, n: float) -> None:
    if not (n > 0 and worse >= 0 and better >= 0 and worse + better <= n * (1 + 1e-12)):
        raise InputError(
            f"{worse} worse and {better} better of {n} pairs: counts of at least 0 are needed, together at most the "
            "number of pairs, and at least one pair."
        )


def _variance(worse: float, better: float, n: float, difference: float) -> float:
    """Return the variance of worse - better, given the difference, at the likeliest share of discordant pairs."""
    if difference < 0:  # the same pairs, before and after exchanged: both roots of the square then stay apart
        worse, better, difference = better, worse, -difference
    b = (2 * n - worse + better) * difference - worse - better
    c = -better * difference * (1 - difference)
    root = math.sqrt(max(b * b - 8 * n * c, 0.0))
    share = -2 * c / (b + root) if b > 0 else (root - b) / (4 * n)  # of pairs that became better
    return n * max(2 * share + difference * (1 - difference), 0.0)


def _upper(worse: float, better: float, n: float, z: float) -> float:
    try:
        from scipy.optimize import brentq
    except ModuleNotFoundError as error:
        raise MissingExtraError("scipy", "report", "comparing runs") from error

    def beyond(difference: float) -> float:
        return worse - better - n * difference + z * math.sqrt(_variance(worse, better, n, difference))

    estimate = (worse - better) / n
    if 1 - estimate <= _OFF:
        return 1.0
    return float(brentq(beyond, estimate + _OFF, 1.0, xtol=1e-14, rtol=1e-14))
