"""Exact statistics of few pairs, where Tango's approximation is not enough: the classes of a guard.

Of n independent pairs, ``worse`` went from good to bad and ``better`` from bad to good; the difference of the two
probabilities is positive where things became worse. The bound inverts the unconditional test of Chan and Zhang
(Biometrics 55, 1999, 1202-1209), ordered by Tango's score statistic: the largest difference whose p, the greatest over
the nuisance (the probability of becoming better), is above the level. The nuisance is searched within its own
99.9 % interval, and the 0.001 is added to p (Berger and Boos, JASA 89, 1994, 1012-1016). Everything left out of a sum
is counted in, so that an error is never on the side of proof.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from benchmarks.statistics.tango import critical_value, tango_z
from safevlm.errors import InputError, MissingExtraError

__all__ = ["clopper_pearson", "exact_interval", "exact_p", "exact_upper", "score"]

Floats: TypeAlias = npt.NDArray[np.float64]

NUISANCE_LEVEL = 0.001
GRID = 48
"""Values of the nuisance that are tried, and again around the worst of them."""
TIE = 1e-9
PRECISION = 2e-5
"""Of a bound: the end that proves less is returned."""
SPREAD = 7.0
"""Standard deviations around the mean that a sum goes over; the rest is counted as evidence of harm."""


def clopper_pearson(k: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the exact two-sided interval of k of n (Biometrika 26, 1934, 404-413).

    Raises InputError unless 0 <= k <= n and n > 0.
    """
    critical_value(confidence)
    if not 0 <= k <= n or n == 0:
        raise InputError(f"{k} of {n}: a count from 0 to the number of samples, and at least one sample, are needed.")
    return _beta_ends(k, n, (1 - confidence) / 2)


@lru_cache(maxsize=65_536)
def exact_upper(worse: int, better: int, n: int, *, level: float = 0.05) -> float:
    """Return the one-sided upper bound of the difference, wrong with a probability of at most ``level``.

    Raises InputError for counts that are not counts of n pairs.
    """
    _check(worse, better, n, level)
    low = (worse - better) / n
    step = 1 / n
    while low + step < 1 and exact_p(worse, better, n, low + step) > level:
        low, step = low + step, 2 * step
    high = min(low + step, 1.0)
    while high - low > PRECISION:
        middle = (low + high) / 2
        low, high = (middle, high) if exact_p(worse, better, n, middle) > level else (low, middle)
    return high


def exact_interval(worse: int, better: int, n: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Return the two-sided interval of the difference, both ends exact."""
    critical_value(confidence)
    level = (1 - confidence) / 2
    return -exact_upper(better, worse, n, level=level), exact_upper(worse, better, n, level=level)


@lru_cache(maxsize=65_536)
def exact_p(worse: int, better: int, n: int, margin: float) -> float:
    """Return p against "the difference is ``margin`` or more"; small p proves that it is less.

    Raises InputError for counts that are not counts of n pairs, or a margin outside -1 to 1.
    """
    _check(worse, better, n, 0.5)
    if not -1 <= margin <= 1:
        raise InputError(f"margin {margin} is not allowed. Give a share from -1 to 1.")
    seen = tango_z(worse, better, n, margin)
    if not math.isfinite(seen):
        return 1.0 if seen > 0 else 0.0
    low, high = _beta_ends(better, n, NUISANCE_LEVEL / 2)
    low, high = max(low, -margin, 0.0), min(high, (1 - margin) / 2)
    if low > high:  # no nuisance that the data allow fits this difference
        return NUISANCE_LEVEL
    shares: Floats = low + (high - low) * np.square(np.linspace(0, 1, GRID))
    found = _probabilities(seen, n, margin, shares)
    at = int(found.argmax())
    around: Floats = np.linspace(shares[max(at - 1, 0)], shares[min(at + 1, GRID - 1)], GRID)
    return min(1.0, max(float(found.max()), float(_probabilities(seen, n, margin, around).max())) + NUISANCE_LEVEL)


def score(worse: npt.ArrayLike, better: npt.ArrayLike, n: float, difference: float) -> Floats:
    """Return Tango's statistic as :func:`~benchmarks.statistics.tango.tango_z` does, of many tables at once."""
    up, down = np.broadcast_arrays(np.asarray(worse, np.float64), np.asarray(better, np.float64))
    gap = up - down - n * difference
    if difference < 0:
        up, down, difference = down, up, -difference
    b = (2 * n - up + down) * difference - up - down
    c = -down * difference * (1 - difference)
    root = np.sqrt(np.maximum(b * b - 8 * n * c, 0.0))
    total = b + root
    first = np.divide(-2 * c, total, out=np.zeros_like(total), where=total > 0)
    share = np.where(b > 0, first, (root - b) / (4 * n))
    spread = np.sqrt(n * np.maximum(2 * share + difference * (1 - difference), 0.0))
    found: Floats = np.where(gap == 0, 0.0, np.copysign(np.inf, gap))
    np.divide(gap, spread, out=found, where=spread > 0)
    return found


def _probabilities(seen: float, n: int, margin: float, shares: Floats) -> Floats:
    """Return P(statistic <= seen) under each share of pairs that become better: as many as there are shares.

    For each count of better pairs the statistic rises with that of worse ones, so that it lies at or below what was
    seen up to some count; the worse are binomial given the better.
    """
    try:
        from scipy.special import bdtr, gammaln, xlog1py, xlogy
    except ModuleNotFoundError as error:
        raise MissingExtraError("scipy", "report", "comparing runs") from error
    wide = SPREAD * np.sqrt(n * shares * (1 - shares)) + SPREAD
    first = max(0, math.floor(float((n * shares - wide).min())))
    last = min(n, math.ceil(float((n * shares + wide).max())))
    better = np.arange(first, last + 1)
    most = _most_worse(seen, better, n, margin)
    choose = gammaln(n + 1) - gammaln(better + 1) - gammaln(n - better + 1)
    shares = shares[:, None]
    weights = np.exp(choose + xlogy(better, shares) + xlog1py(n - better, -shares))
    given = np.clip((margin + shares) / np.maximum(1 - shares, 1e-300), 0.0, 1.0)
    below = np.where(most < 0, 0.0, bdtr(np.maximum(most, 0), n - better, given))
    rest = np.maximum(1 - weights.sum(axis=1), 0.0)
    found: Floats = (weights * below).sum(axis=1) + rest
    return found


def _most_worse(seen: float, better: npt.NDArray[np.int64], n: int, margin: float) -> npt.NDArray[np.int64]:
    """Return, for each count of better pairs, the most worse ones with a statistic of at most ``seen``; -1 for none."""
    low: npt.NDArray[np.int64] = np.full(len(better), -1, np.int64)
    high: npt.NDArray[np.int64] = n - better
    while (low < high).any():
        middle = -((-low - high) // 2)  # rounded up
        fits = score(middle, better, n, margin) <= seen + TIE
        low, high = np.where(fits, middle, low), np.where(fits, high, middle - 1)
    return low


def _beta_ends(k: int, n: int, tail: float) -> tuple[float, float]:
    try:
        from scipy.special import betaincinv
    except ModuleNotFoundError as error:
        raise MissingExtraError("scipy", "report", "comparing runs") from error
    low = 0.0 if k == 0 else float(betaincinv(k, n - k + 1, tail))
    return low, 1.0 if k == n else float(betaincinv(k + 1, n - k, 1 - tail))


def _check(worse: int, better: int, n: int, level: float) -> None:
    if not (n > 0 and worse >= 0 and better >= 0 and worse + better <= n):
        raise InputError(
            f"{worse} worse and {better} better of {n} pairs: counts of at least 0 are needed, together at most the "
            "number of pairs, and at least one pair."
        )
    if not 0 < level < 1:
        raise InputError(f"level {level} is not allowed. Give a number above 0 and below 1, such as 0.05.")
