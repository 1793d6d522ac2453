"""The interval of one share."""

from __future__ import annotations

from benchmarks.statistics.tango import critical_value
from safevlm.errors import InputError, MissingExtraError

__all__ = ["wilson_interval"]


def wilson_interval(k: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval (J. Am. Stat. Assoc. 22, 1927, 209-212) of k of n; samples are independent.

    Raises InputError unless 0 <= k <= n and n > 0.
    """
    critical_value(confidence)
    if not 0 <= k <= n or n == 0:
        raise InputError(f"{k} of {n}: a count from 0 to the number of samples, and at least one sample, are needed.")
    try:
        from statsmodels.stats.proportion import proportion_confint
    except ModuleNotFoundError as error:
        raise MissingExtraError("statsmodels", "report", "comparing runs") from error
    low, high = proportion_confint(k, n, alpha=1 - confidence, method="wilson")
    return (0.0 if k == 0 else float(low)), (1.0 if k == n else float(high))  # rounding must not leave 0 to 1
