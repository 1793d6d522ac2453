"""How faithful a distilled guard is to the exact one, each figure with a 95 % interval.

Own code, because distilling needs the extra ``torch`` alone: statsmodels and scikit-learn, which ``benchmarks`` takes,
would bring scipy and pandas to every export. Tests hold both equal.

Shapes: n images, C classes. Probabilities are float arrays n × C; p(unsafe) is 1 - p(safe).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtimes.guard.policy import DEFAULT_BLOCK
from runtimes.guard.verdict import blocks, unsafe_probability

__all__ = ["auroc", "bootstrap", "fidelity", "mean_kl", "recall_at_fpr", "wilson"]

Z = 1.959963984540054
"""Two-sided 95 %."""
DRAWS = 1000
FALSE_POSITIVE_RATES = (0.01, 0.05)

Floats = NDArray[np.floating[Any]]
Flags = NDArray[np.bool_]
Interval = dict[str, float | None]


def wilson(hits: int, n: int) -> Interval:
    """Return a share with its Wilson score interval; nulls for n = 0."""
    if n == 0:
        return {"value": None, "low": None, "high": None}
    share = hits / n
    centre = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n)) / (1 + Z * Z / n)
    low = 0.0 if hits == 0 else centre - half
    high = 1.0 if hits == n else centre + half
    return {"value": share, "low": low, "high": high}


def auroc(scores: Floats, positive: Flags) -> float | None:
    """Return the probability that a positive outscores a negative, ties counting half; ``None`` without both."""
    wins, losses = int(positive.sum()), int((~positive).sum())
    if not wins or not losses:
        return None
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return float((ranks[positive].sum() - wins * (wins + 1) / 2) / (wins * losses))


def recall_at_fpr(scores: Floats, positive: Flags, rate: float) -> float | None:
    """Return the share of positives at or above the lowest score that at most ``rate`` of negatives reach."""
    if not positive.any() or positive.all():
        return None
    negatives = np.sort(scores[~positive])[::-1]
    allowed = int(rate * len(negatives) + 1e-9)
    if allowed >= len(negatives):
        return 1.0
    return float((scores[positive] > negatives[allowed]).mean())


def mean_kl(teacher: Floats, student: Floats) -> float:
    """Return the mean Kullback-Leibler divergence KL(teacher || student) in nats; 0 · log 0 is 0."""
    p, q = teacher.astype(np.float64), np.maximum(student.astype(np.float64), 1e-12)
    terms = np.where(p > 0, p * (np.log(np.maximum(p, 1e-300)) - np.log(q)), 0.0)
    return float(terms.sum(axis=1).mean())


def bootstrap(statistic: Callable[[NDArray[np.int64]], float | None], n: int, *, seed: int = 0) -> Interval:
    """Return a statistic of all n rows with its percentile interval over resampled rows."""
    value = statistic(np.arange(n))
    if value is None:
        return {"value": None, "low": None, "high": None}
    rng = np.random.default_rng([seed, n])
    drawn = [found for _ in range(DRAWS) if (found := statistic(rng.integers(n, size=n))) is not None]
    low, high = np.percentile(drawn, [2.5, 97.5]) if drawn else (value, value)
    return {"value": value, "low": float(low), "high": float(high)}


def fidelity(
    teacher: Floats,
    student: Floats,
    classes: Sequence[str],
    *,
    safe: int = 0,
    labels: NDArray[np.int64] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare a student with its teacher on held-out images; a dict that JSON can hold.

    Keys: ``n``; ``agreement`` (same most probable class), ``kl``, ``auroc``, ``recall_at_1_fpr`` and
    ``recall_at_5_fpr`` of the student's p(unsafe) against the teacher's verdict (p(unsafe) >= 0.5), each with
    ``value``, ``low``, ``high`` (null where a side is absent); ``per_class`` by the teacher's class: ``n`` and
    ``agreement``; ``labels`` with ``n`` and the same figures against true classes (-1: none), and the
    teacher's own accuracy, where labels are given.
    """
    said, truth = student.argmax(axis=1), teacher.argmax(axis=1)
    same = said == truth
    scores = unsafe_probability(student, safe)
    found: dict[str, Any] = {
        "n": len(teacher),
        "agreement": wilson(int(same.sum()), len(same)),
        "kl": bootstrap(lambda rows: mean_kl(teacher[rows], student[rows]), len(teacher), seed=seed),
        **_detection(scores, blocks(unsafe_probability(teacher, safe), DEFAULT_BLOCK), seed),
        "per_class": {
            name: {
                "n": int((truth == k).sum()),
                "agreement": wilson(int(same[truth == k].sum()), int((truth == k).sum())),
            }
            for k, name in enumerate(classes)
        },
    }
    if labels is not None:
        known = labels >= 0
        found["labels"] = {
            "n": int(known.sum()),
            "accuracy": wilson(int((said == labels)[known].sum()), int(known.sum())),
            "teacher_accuracy": wilson(int((truth == labels)[known].sum()), int(known.sum())),
            **_detection(scores[known], labels[known] != safe, seed),
        }
    return found


def _share(hits: Flags) -> dict[str, Any]:
    return {"n": len(hits), "agreement": wilson(int(hits.sum()), len(hits))}


def _detection(scores: Floats, unsafe: Flags, seed: int) -> dict[str, Interval]:
    n = len(scores)
    found = {"auroc": bootstrap(lambda rows: auroc(scores[rows], unsafe[rows]), n, seed=seed)}
    for rate in FALSE_POSITIVE_RATES:
        found[f"recall_at_{100 * rate:.0f}_fpr"] = bootstrap(
            lambda rows, rate=rate: recall_at_fpr(scores[rows], unsafe[rows], rate),  # type: ignore[misc]
            n,
            seed=seed,
        )
    return found
