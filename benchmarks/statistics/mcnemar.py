"""McNemar's exact test: did more samples change to bad than to good, or fewer?"""

from __future__ import annotations

from functools import lru_cache

from safevlm.errors import InputError, MissingExtraError

__all__ = ["mcnemar_exact"]


@lru_cache(maxsize=65_536)
def mcnemar_exact(worse: int, better: int) -> float:
    """Return the two-sided exact p of "changes go both ways alike"; 1 where nothing changed.

    It takes samples as independent: where several share an image, ``clustered.sign_flip_p`` stands beside it.

    Raises InputError for counts below 0.
    """
    if worse < 0 or better < 0:
        raise InputError(f"{worse} worse and {better} better; counts must be at least 0.")
    if worse == better:
        return 1.0
    try:
        from scipy.stats import binomtest
    except ModuleNotFoundError as error:
        raise MissingExtraError("scipy", "report", "comparing runs") from error
    return float(binomtest(worse, worse + better, 0.5).pvalue)
