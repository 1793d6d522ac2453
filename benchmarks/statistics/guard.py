"""Metrics of a 20-class guard: rows of probabilities (float, N x C) against true classes (int, N; 0 is safe).

The binary score is p(unsafe) = 1 - p[0]; an image is blocked from ``threshold`` on. The calibration error is the
expected calibration error of p(unsafe) over 15 bins of equal width: the mean over images of how far, in an image's
bin, mean p(unsafe) lies from the share of unsafe images (Guo et al., ICML 2017, in its binary form).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from benchmarks.statistics.clustered import DRAWS
from benchmarks.statistics.tango import critical_value
from runtimes.guard.verdict import blocks, unsafe_probability
from safevlm.errors import InputError, MissingExtraError

__all__ = [
    "BINS",
    "GuardMetrics",
    "guard_metrics",
    "paired_bootstrap",
    "reliability_points",
    "roc_points",
]

BINS = 15
_CHUNK = 500
"""Draws at a time: 500 x 1,791 counts take 7 MB."""

Floats: TypeAlias = npt.NDArray[np.float64]
Whole: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class GuardMetrics:
    """Shares in 0..1; NaN where there is no image to measure on: recall without unsafe ones, FPR without safe ones."""

    accuracy: float
    """Right class, of all classes."""
    auroc: float
    """Of safe against unsafe; NaN without both."""
    recall: float
    """Unsafe images that are blocked."""
    fpr: float
    """Safe images that are blocked."""
    ece: float


def guard_metrics(probs: npt.ArrayLike, labels: npt.ArrayLike, threshold: float) -> GuardMetrics:
    """Measure a guard. Raises InputError for shapes that disagree, no image, classes or probabilities out of range."""
    rows, truth = _checked(probs, labels)
    score, unsafe = unsafe_probability(rows), truth > 0
    blocked = blocks(score, threshold)
    return GuardMetrics(
        accuracy=float((rows.argmax(axis=1) == truth).mean()),
        auroc=_auroc(score, unsafe),
        recall=_share(blocked[unsafe]),
        fpr=_share(blocked[~unsafe]),
        ece=float(_eces(score, unsafe, np.ones((1, len(score))))[0]),
    )


def roc_points(probs: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[Floats, Floats]:
    """Return FPR and recall along the thresholds, both rising from 0 to 1; empty without images of both kinds."""
    rows, truth = _checked(probs, labels)
    if len(np.unique(truth > 0)) < 2:
        return np.empty(0), np.empty(0)
    try:
        from sklearn.metrics import roc_curve
    except ModuleNotFoundError as error:
        raise MissingExtraError("scikit-learn", "report", "measuring a guard") from error
    fpr, recall, _ = roc_curve(truth > 0, unsafe_probability(rows))
    return fpr.astype(np.float64), recall.astype(np.float64)


def reliability_points(probs: npt.ArrayLike, labels: npt.ArrayLike, bins: int = BINS) -> tuple[Floats, Floats, Whole]:
    """Return, of each bin that has images, mean p(unsafe), the share of unsafe images, and how many images."""
    rows, truth = _checked(probs, labels)
    score = unsafe_probability(rows)
    at = _bins(score, bins)
    counts = np.bincount(at, minlength=bins)
    full = counts > 0
    told = np.bincount(at, score, minlength=bins)[full] / counts[full]
    true = np.bincount(at, truth > 0, minlength=bins)[full] / counts[full]
    return told, true, counts[full].astype(np.int64)


def paired_bootstrap(
    metric: str,
    before: npt.ArrayLike,
    after: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    confidence: float = 0.95,
    draws: int = DRAWS,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the percentile interval of ``auroc`` or ``ece``, after - before; images drawn again, both rows each.

    One row is one image, so rows are independent. Draws that lack safe or unsafe images are left out of AUROC's. ECE
    of a resample is a little too large (noise adds to every bin), in both runs alike, so that it largely cancels.

    Raises InputError as :func:`guard_metrics`, for another metric, or AUROC without images of both kinds.
    """
    (first, truth), (second, _) = _checked(before, labels), _checked(after, labels)
    unsafe = truth > 0
    measure = {"auroc": _aurocs, "ece": _eces}.get(metric)
    if measure is None:
        raise InputError(f"metric {metric!r} is unknown. Allowed: auroc, ece.")
    if metric == "auroc" and len(np.unique(unsafe)) < 2:
        raise InputError("AUROC needs both safe and unsafe images.")
    return _difference(measure, unsafe_probability(first), unsafe_probability(second), unsafe, confidence, draws, seed)


def _difference(
    measure: Callable[[Floats, npt.NDArray[np.bool_], Floats], Floats],
    before: Floats,
    after: Floats,
    unsafe: npt.NDArray[np.bool_],
    confidence: float,
    draws: int,
    seed: int,
) -> tuple[float, float]:
    critical_value(confidence)
    found = [
        measure(after, unsafe, counts) - measure(before, unsafe, counts) for counts in _counts(len(unsafe), draws, seed)
    ]
    differences = np.concatenate(found)
    tail = 50 * (1 - confidence)
    low, high = np.nanpercentile(differences, [tail, 100 - tail])
    return float(low), float(high)


def _counts(n: int, draws: int, seed: int) -> Iterator[Floats]:
    """Yield how often each image was drawn, a chunk of draws at a time: D x N."""
    rng = np.random.default_rng([seed, 3])
    for start in range(0, draws, _CHUNK):
        size = min(_CHUNK, draws - start)
        drawn = rng.integers(0, n, (size, n)) + n * np.arange(size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n).astype(np.float64)


def _aurocs(score: Floats, unsafe: npt.NDArray[np.bool_], counts: Floats) -> Floats:
    """Return AUROC of each draw, NaN where it has images of one kind only: for each value of the score, how many
    unsafe images have it, times the safe ones below and half of those that tie."""
    order = np.argsort(score, kind="stable")
    starts = np.flatnonzero(np.diff(score[order], prepend=-1.0))
    drawn = counts[:, order]
    positive = np.add.reduceat(drawn * unsafe[order], starts, axis=1)
    negative = np.add.reduceat(drawn * ~unsafe[order], starts, axis=1)
    below = np.cumsum(negative, axis=1) - negative / 2
    pairs = positive.sum(axis=1) * negative.sum(axis=1)
    found: Floats = np.full(len(pairs), np.nan)
    np.divide((positive * below).sum(axis=1), pairs, out=found, where=pairs > 0)
    return found


def _eces(score: Floats, unsafe: npt.NDArray[np.bool_], counts: Floats) -> Floats:
    gaps = np.zeros((len(score), BINS))
    gaps[np.arange(len(score)), _bins(score, BINS)] = score - unsafe
    found: Floats = np.abs(counts @ gaps).sum(axis=1) / counts.sum(axis=1)
    return found


def _auroc(score: Floats, unsafe: npt.NDArray[np.bool_]) -> float:
    if len(np.unique(unsafe)) < 2:
        return float("nan")
    try:
        from sklearn.metrics import roc_auc_score
    except ModuleNotFoundError as error:
        raise MissingExtraError("scikit-learn", "report", "measuring a guard") from error
    return float(roc_auc_score(unsafe, score))


def _bins(score: Floats, bins: int) -> npt.NDArray[np.intp]:
    return np.minimum((score * bins).astype(np.intp), bins - 1)


def _share(flags: npt.NDArray[np.bool_]) -> float:
    return float(flags.mean()) if len(flags) else float("nan")


def _checked(probs: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[Floats, Whole]:
    rows: Floats = np.asarray(probs, dtype=np.float64)
    truth: Whole = np.asarray(labels, dtype=np.int64)
    if rows.ndim != 2 or rows.shape[1] < 2 or truth.shape != rows.shape[:1] or not len(rows):
        raise InputError(
            f"probabilities of shape {rows.shape} and labels of shape {truth.shape}: N x C (C at least 2) and N are "
            "needed, N at least 1."
        )
    if not ((rows >= 0) & (rows <= 1)).all():
        raise InputError("each probability of a guard must be a number from 0 to 1.")
    if ((truth < 0) | (truth >= rows.shape[1])).any():
        raise InputError(f"a label is not one of the {rows.shape[1]} classes 0 to {rows.shape[1] - 1}.")
    return rows, truth
