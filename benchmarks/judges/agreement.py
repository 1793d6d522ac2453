"""How far judges agree with each other, and whether two judgements of the same rows have anything in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
import numpy.typing as npt

from safevlm.errors import InputError, MissingExtraError

__all__ = ["Agreement", "agreement", "surely_below"]

SURE = 1.645
"""Standard errors of a one-sided bound at 95 %."""
MIXED = 0.15
"""Share that would differ by chance alone, below which two judgements leave too little to tell."""
Words = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Two judges on the ``n`` rows that both scored.

    ``kappa`` is Cohen's (Educational and Psychological Measurement 20, 1960, 37-46); None where it is undefined: no
    rows, or both judges said one and the same thing of all of them. ``agreement`` is the share scored alike.
    """

    kappa: float | None
    agreement: float | None
    n: int


def agreement(first: Sequence[bool | None], other: Sequence[bool | None]) -> Agreement:
    """Compare two judges' scores of the same rows, in the same order; None is unscored.

    Raises InputError when there are not as many of one as of the other.
    """
    if len(first) != len(other):
        raise InputError(f"scores of {len(first)} and {len(other)} rows cannot be compared. Give both for all rows.")
    both = [(one, two) for one, two in zip(first, other, strict=True) if one is not None and two is not None]
    if not both:
        return Agreement(kappa=None, agreement=None, n=0)
    alike = sum(one == two for one, two in both) / len(both)
    if len({score for pair in both for score in pair}) < 2:
        return Agreement(kappa=None, agreement=alike, n=len(both))
    try:
        from sklearn.metrics import cohen_kappa_score
    except ModuleNotFoundError as error:
        raise MissingExtraError("scikit-learn", "report", "comparing judges") from error
    kappa = float(cohen_kappa_score([one for one, _ in both], [two for _, two in both]))
    return Agreement(kappa=kappa, agreement=alike, n=len(both))


def surely_below(kappa: float, one: Words, other: Words, strata: Words) -> bool:
    """Say whether Cohen's kappa of two judgements, chance taken within strata, is below this one by more than chance.

    Where nearly all is judged alike there is nothing to say; without rows, too.
    """
    if not len(one):
        return False
    alike, by_chance = float((one == other).mean()), 0.0
    for stratum in np.unique(strata):
        first, second = one[strata == stratum], other[strata == stratum]
        shares = [float((first == word).mean()) * float((second == word).mean()) for word in np.unique(first)]
        by_chance += len(first) / len(one) * sum(shares)
    if 1 - by_chance < MIXED:
        return False
    spread = sqrt(max(by_chance * (1 - by_chance), alike * (1 - alike)) / len(one))
    return alike - by_chance + SURE * spread < kappa * (1 - by_chance)
