"""Many small classes at once: which of them are worse, and how many images a claim about one takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from statistics import NormalDist

from benchmarks.statistics.exact import exact_p
from benchmarks.statistics.holm import holm
from benchmarks.statistics.mcnemar import mcnemar_exact
from safevlm.errors import InputError, MissingExtraError

__all__ = ["images_needed", "images_to_settle", "mcnemar_family", "worse_p"]

_MOST = 20_000
"""Images of one class beyond which no plan is worth a number."""
_MANY = 30
"""Changed images from which on the normal approximation plans as well as the exact count, and much faster."""


def mcnemar_family(changed: Sequence[tuple[int, int]], level: float) -> list[float]:
    """Return McNemar's exact p of each (worse, better), corrected so that ``level`` holds over all of them.

    Holm's correction over the classes in which so many images changed that harm could be shown at all (Tarone,
    Biometrics 46, 1990, 515-522): how many changed says nothing of the direction, and a class in which two images
    changed can never be told as harm, so it does not count. Those that cannot have 1.

    Raises InputError for a level outside 0 to 1, and for counts below 0.
    """
    if not 0 < level < 1:
        raise InputError(f"level {level} is not allowed. Give a number above 0 and below 1, such as 0.05.")
    least = [mcnemar_exact(worse + better, 0) for worse, better in changed]
    count = next((k for k in range(1, len(least) + 1) if sum(p <= level / k for p in least) <= k), len(least))
    able = [at for at, p in enumerate(least) if count and p <= level / count]
    found = [1.0] * len(changed)
    for at, p in zip(able, holm([mcnemar_exact(*changed[at]) for at in able]), strict=True):
        found[at] = p
    return found


def worse_p(worse: int, better: int) -> float:
    """Return the one-sided exact p of "not more images became worse than better"."""
    try:
        from scipy.stats import binom
    except ModuleNotFoundError as error:
        raise MissingExtraError("scipy", "report", "comparing runs") from error
    return float(binom.sf(worse - 1, worse + better, 0.5)) if worse + better else 1.0


@lru_cache(maxsize=4_096)
def images_needed(churn: float, margin: float, *, level: float = 0.05, power: float = 0.8) -> int | None:
    """Return how many images prove a difference below ``margin`` with probability ``power`` if nothing changed.

    ``churn`` is the share of images that change between two such runs, half of them either way. None where more than
    20,000 would be needed. The power of exact tests does not rise evenly: a few images more may have a little less.

    Raises InputError for shares outside 0 to 1.
    """
    if not (0 <= churn <= 1 and 0 < margin < 1 and 0 < power < 1):
        raise InputError(f"churn {churn}, margin {margin} and power {power} are shares from 0 to 1.")

    z = NormalDist().inv_cdf(1 - level) + NormalDist().inv_cdf(power)
    many = math.ceil(churn * (z / margin) ** 2 + 1 / margin)  # the latter corrects for counts being whole
    if churn * many > _MANY:
        return many if many <= _MOST else None

    def enough(n: int) -> bool:
        return exact_p(0, 0, n, margin) <= level and _power(n, churn, margin, level) >= power

    return _first(enough)


def images_to_settle(worse: int, better: int, n: int, margin: float, *, level: float = 0.05) -> int | None:
    """Return about how many images would prove a difference below ``margin`` if the rates seen stayed; None for none.

    Raises InputError for counts that are not counts of n pairs.
    """
    if (worse - better) / n >= margin:
        return None

    def enough(images: int) -> bool:
        scale = images / n
        up = math.ceil(worse * scale - 1e-9)
        down = min(math.floor(better * scale + 1e-9), images - up)
        return exact_p(up, down, images, margin) <= level

    return _first(enough, start=n)


def _power(n: int, churn: float, margin: float, level: float) -> float:
    from scipy.stats import binom

    half = churn / 2
    last = int(binom.isf(1e-6, n, half)) + 1
    most, power = -1, 0.0
    for better in range(min(last, n) + 1):
        while most + 1 + better <= n and exact_p(most + 1, better, n, margin) <= level:
            most += 1
        power += float(binom.pmf(better, n, half) * binom.cdf(min(most, n - better), n - better, half / (1 - half)))
    return power


def _first(enough: Callable[[int], bool], start: int = 1) -> int | None:
    """Halve the span in which the first number lies that is enough."""
    high = max(start, 1)
    while not enough(high):
        high *= 2
        if high > _MOST:
            return None
    low = max(high // 2, start - 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
