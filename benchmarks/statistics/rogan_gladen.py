"""A rate corrected for the errors of the judge who counted, from a sample that people labelled.

Estimate: Rogan and Gladen, American Journal of Epidemiology 107 (1978) 71-76. Interval: Lang and Reiczigel, Preventive
Veterinary Medicine 113 (2014) 13-22, which also takes sensitivity and specificity as estimated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from benchmarks.statistics.tango import critical_value
from safevlm.errors import InputError

__all__ = ["Corrected", "rogan_gladen"]


@dataclass(frozen=True, kw_only=True)
class Corrected:
    """A corrected rate, 0..1, with its interval; and the judge's sensitivity and specificity as observed."""

    estimate: float
    interval: tuple[float, float]
    sensitivity: float
    specificity: float


def rogan_gladen(
    positives: int,
    n: int,
    true_positive: int,
    positive_labelled: int,
    true_negative: int,
    negative_labelled: int,
    *,
    confidence: float = 0.95,
) -> Corrected:
    """Correct ``positives`` of n; the judge found ``true_positive`` of ``positive_labelled``, and so for negatives.

    The labelled sample is taken as independent of the n, and all rows as independent of each other.

    Raises InputError for impossible counts, and for a judge no better than chance (sensitivity + specificity <= 1).
    """
    for k, total, what in (
        (positives, n, "rows that were judged"),
        (true_positive, positive_labelled, "labelled positive"),
        (true_negative, negative_labelled, "labelled negative"),
    ):
        if not 0 <= k <= total or total == 0:
            raise InputError(f"{k} of {total} {what}: at least one, and a count from 0 to their number, are needed.")
    sensitivity, specificity = true_positive / positive_labelled, true_negative / negative_labelled
    if sensitivity + specificity <= 1:
        raise InputError(
            f"the judge found {true_positive} of {positive_labelled} positives and {true_negative} of "
            f"{negative_labelled} negatives, no better than chance, so its rates cannot be corrected. Label more "
            "rows, or use another judge."
        )
    estimate = (positives / n + specificity - 1) / (sensitivity + specificity - 1)
    return Corrected(
        estimate=_clip(estimate),
        interval=_interval(
            positives, n, true_positive, positive_labelled, true_negative, negative_labelled, critical_value(confidence)
        ),
        sensitivity=sensitivity,
        specificity=specificity,
    )


def _interval(
    positives: int, n: int, true_positive: int, pos: int, true_negative: int, neg: int, z: float
) -> tuple[float, float]:
    """Shrink all three shares, take the delta method's spread, shift: Lang and Reiczigel's section 2."""
    n_, pos_, neg_ = n + z * z, pos + 2, neg + 2
    rate, se, sp = (positives + z * z / 2) / n_, (true_positive + 1) / pos_, (true_negative + 1) / neg_
    if se + sp <= 1:  # a few labels only: shrunk towards a half, they no longer tell the judge from chance
        return 0.0, 1.0
    true = (rate + sp - 1) / (se + sp - 1)
    se_part, sp_part = se * (1 - se) / pos_, sp * (1 - sp) / neg_
    shift = 2 * z * z * (true * se_part - (1 - true) * sp_part)
    spread = math.sqrt(rate * (1 - rate) / n_ + true**2 * se_part + (1 - true) ** 2 * sp_part) / (se + sp - 1)
    return _clip(true + shift - z * spread), _clip(true + shift + z * spread)


def _clip(value: float) -> float:
    return min(max(value, 0.0), 1.0)
