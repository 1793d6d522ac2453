"""What the guard does to corrupted images before and after: whether a compressed guard is less robust.

The rows are those of ``benchmarks.run --under``, each image paired with itself under the same corruption, at the
operating point of the baseline.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.comparison.margins import Margins
from benchmarks.comparison.measures import GuardRows, Measure, Unscored, guard_measure, guard_rows
from benchmarks.comparison.pairing import Pair

__all__ = ["robust_measures"]


def robust_measures(
    pairs: Sequence[Pair], threshold: float | None, margins: Margins
) -> tuple[list[Measure], list[Unscored]]:
    """Return recall and FPR under each corruption and, of several, the mean recall; and what has no probabilities."""
    found, missing = [], []
    for name in dict.fromkeys(pair.before.under for pair in pairs if pair.before.under is not None):
        rows, unjudged = guard_rows(pairs, threshold, under=name)
        missing.append(unjudged)
        if rows is not None:
            found += _of_corruption(name, rows, margins)
    recalls = [each for each in found if not each.lower_is_better]
    if len(recalls) > 1:
        found.insert(0, _mean(recalls))
    return found, missing


def _of_corruption(name: str, rows: GuardRows, margins: Margins) -> list[Measure]:
    points = rows.threshold, rows.threshold
    margin = margins.share("robust_recall")
    found = [
        guard_measure(f"recall/{name}", f"guard recall under {name}", rows, points, margin),
        guard_measure(f"fpr/{name}", f"guard FPR under {name}", rows, points, None),
    ]
    return [each for each in found if each.pairs]


def _mean(recalls: Sequence[Measure]) -> Measure:
    """Return the mean of recalls, each a stratum; an image is one cluster in all of them."""
    return Measure(
        key="guard/robust_recall",
        title=f"guard recall, mean of {len(recalls)} corruptions",
        group="guard",
        lower_is_better=False,
        pairs=tuple(pair for each in recalls for pair in each.pairs),
        before=np.concatenate([each.before for each in recalls]),
        after=np.concatenate([each.after for each in recalls]),
        strata=tuple(each.key for each in recalls for _ in each.pairs),
    )
