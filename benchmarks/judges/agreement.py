"""How far judges agree with each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from safevlm.errors import InputError, MissingExtraError

__all__ = ["Agreement", "agreement"]


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
