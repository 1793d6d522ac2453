"""The guard's lines, curves and flips: what a release manager wants to know beside recall and FPR."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from benchmarks.comparison.findings import Curve, Flip, GuardCurves, Line
from benchmarks.comparison.measures import GuardRows
from benchmarks.statistics.guard import guard_metrics, paired_bootstrap, reliability_points, roc_points
from runtimes.guard.verdict import blocks, unsafe_probability

__all__ = ["guard_curves", "guard_flips", "guard_number_lines"]

Floats = npt.NDArray[np.float64]


def guard_number_lines(rows: GuardRows, confidence: float, seed: int) -> list[Line]:
    """Return AUROC of p(unsafe) and calibration error, with intervals of the paired bootstrap over images."""
    before, after = (guard_metrics(probs, rows.labels, rows.threshold) for probs in (rows.before, rows.after))
    both_kinds = 0 < int((rows.labels > 0).sum()) < len(rows.labels)
    found = []
    for name, title, lower in (("auroc", "guard AUROC", False), ("ece", "guard calibration error (ECE)", True)):
        if name == "auroc" and not both_kinds:
            continue  # a ranking of one kind alone has no AUROC
        interval = paired_bootstrap(name, rows.before, rows.after, rows.labels, confidence=confidence, seed=seed)
        one, other = float(getattr(before, name)), float(getattr(after, name))
        found.append(
            Line(
                key=f"guard/{name}",
                title=title,
                group="guard",
                unit="number",
                lower_is_better=lower,
                n=len(rows.labels),
                clusters=len(rows.labels),
                before=one,
                after=other,
                change=other - one,
                interval=interval,
                method="paired bootstrap over images",
            )
        )
    return found


def guard_curves(probs: Floats, labels: npt.NDArray[np.int64]) -> GuardCurves:
    """Return ROC and reliability of p(unsafe)."""
    roc, reliability = roc_points(probs, labels), reliability_points(probs, labels)
    return GuardCurves(
        roc=Curve(x=_tuple(roc[0]), y=_tuple(roc[1])),
        reliability=Curve(x=_tuple(reliability[0]), y=_tuple(reliability[1])),
        bins=tuple(int(count) for count in reliability[2]),
    )


def guard_flips(rows: GuardRows, classes: Sequence[str] | None) -> list[Flip]:
    """Return images that are blocked in one run and not in the other."""
    found = []
    for at, pair in enumerate(rows.pairs):
        blocked = [blocks(unsafe_probability(probs[at]), rows.threshold) for probs in (rows.before, rows.after)]
        if blocked[0] == blocked[1]:
            continue
        unsafe = bool(rows.labels[at] > 0)
        found.append(
            Flip(
                id=pair.before.id,
                kind="image",
                judge=None,
                worse=bool(blocked[1]) != unsafe,
                category=pair.before.category,
                image=pair.before.image,
                before=_told(rows.before[at], classes),
                after=_told(rows.after[at], classes),
                why_before=_why(bool(blocked[0]), rows.before[at], rows.threshold),
                why_after=_why(bool(blocked[1]), rows.after[at], rows.threshold),
                suite=pair.suite,
            )
        )
    return found


def _told(row: Floats, classes: Sequence[str] | None) -> str:
    at = int(row.argmax())
    name = classes[at] if classes is not None else f"class {at}"
    return f"{name}, p(unsafe) {unsafe_probability(row):.4f}"


def _why(blocked: bool, row: Floats, threshold: float) -> str:
    p = unsafe_probability(row)
    return (
        f"blocked: p(unsafe) {p:.4f} ≥ {threshold:.2g}" if blocked else f"allowed: p(unsafe) {p:.4f} < {threshold:.2g}"
    )


def _tuple(values: Floats) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
