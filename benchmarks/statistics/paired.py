"""All statistics of one line of the report, from each sample's badness before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from benchmarks.statistics.clustered import DRAWS, Clusters, bootstrap_bounds, sign_flip_p
from benchmarks.statistics.mcnemar import mcnemar_exact
from benchmarks.statistics.planning import resolvable_margin
from benchmarks.statistics.tango import one_sided_value, tango_bound, tango_interval
from safevlm.errors import InputError

__all__ = ["BOOTSTRAP", "POWER", "TANGO", "PairedStatistics", "line_statistics", "paired_statistics"]

TANGO = "Tango's score interval"
BOOTSTRAP = "image-clustered bootstrap (BCa)"
POWER = 0.8

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class PairedStatistics:
    """Badness before and after, 0..1, and the worsening (after - before) with its intervals; see the module.

    ``interval`` and ``bootstrap`` are two-sided; ``uppers`` are the one-sided bounds that must all lie below a margin,
    that of the samples and that of the images. ``worse`` and ``better`` count samples, ``p_harm`` is two-sided,
    ``resolvable`` is the smallest margin that would be proven with probability :data:`POWER` if nothing had changed on
    average.
    """

    before: float
    after: float
    change: float
    interval: tuple[float, float]
    method: str
    bootstrap: tuple[float, float]
    worse: int
    better: int
    uppers: tuple[float, float]
    p_harm: float
    resolvable: float


def paired_statistics(
    before: npt.ArrayLike,
    after: npt.ArrayLike,
    *,
    clusters: Sequence[object] | npt.NDArray[np.generic],
    strata: Sequence[object] | npt.NDArray[np.generic] | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    draws: int = DRAWS,
) -> PairedStatistics:
    """Return the statistics of one measure over N samples.

    ``before`` and ``after`` are badness, 0 to 1; ``clusters`` the image of each sample. With ``strata`` the measure is
    the plain mean over strata's means. Yes-or-no badness without strata has Tango's interval, everything else the
    bootstrap's; the bootstrap stands beside Tango's, too.

    Raises InputError for lengths that disagree, no sample, badness that is no number from 0 to 1.
    """
    both: Floats = np.stack([_badness(before), _badness(after)]) if _alike(before, after) else np.empty((2, 0))
    groups = np.zeros(both.shape[1], dtype=np.int64) if strata is None else np.asarray(strata)
    kinds = len(np.unique(groups))
    where = Clusters(groups, np.asarray(clusters), np.full(kinds, 1 / max(kinds, 1)))
    means = where.estimate(where.sums(both.T))
    counted = strata is None and bool(np.isin(both, (0.0, 1.0)).all())
    found = line_statistics(
        where, (both[1] - both[0])[:, None], counted=counted, confidence=confidence, seed=seed, draws=draws
    )[0]
    return PairedStatistics(**{**vars(found), "before": float(means[0]), "after": float(means[1])})


def line_statistics(
    where: Clusters, worsening_NR: Floats, *, counted: bool, confidence: float, seed: int, draws: int
) -> list[PairedStatistics]:
    """Return the statistics of R pairs of runs over the same samples; ``before`` and ``after`` are NaN here.

    ``counted``: badness is yes or no, and the measure one share.
    """
    sums = where.sums(worsening_NR)
    changes = where.estimate(sums)
    drawn = bootstrap_bounds(where, sums, draws=draws, seed=seed, confidence=confidence)
    swapped = sign_flip_p(where, sums, draws=draws, seed=seed)
    reach = one_sided_value(confidence) + NormalDist().inv_cdf(POWER)
    found = []
    for run, change in enumerate(changes):
        worse, better = int((worsening_NR[:, run] > 0).sum()), int((worsening_NR[:, run] < 0).sum())
        bootstrap, bound = (float(drawn.low[run]), float(drawn.high[run])), float(drawn.bound[run])
        p_harm, resolvable = float(swapped[run]), max(float(drawn.nearest[run]), reach * float(drawn.error[run]))
        if counted:
            p_harm = max(p_harm, mcnemar_exact(worse, better))
            resolvable = max(resolvable, resolvable_margin(worse, better, where.n, confidence=confidence, power=POWER))
        found.append(
            PairedStatistics(
                before=float("nan"),
                after=float("nan"),
                change=float(change),
                interval=tango_interval(worse, better, where.n, confidence=confidence) if counted else bootstrap,
                method=TANGO if counted else BOOTSTRAP,
                bootstrap=bootstrap,
                worse=worse,
                better=better,
                uppers=(tango_bound(worse, better, where.n, confidence=confidence) if counted else bound, bound),
                p_harm=p_harm,
                resolvable=min(resolvable, where.span),
            )
        )
    return found


def _alike(before: npt.ArrayLike, after: npt.ArrayLike) -> bool:
    shapes = np.shape(before), np.shape(after)
    if shapes[0] != shapes[1] or len(shapes[0]) != 1:
        raise InputError(f"badness of shapes {shapes[0]} and {shapes[1]}; each sample needs one number in both runs.")
    return True


def _badness(values: npt.ArrayLike) -> Floats:
    found: Floats = np.asarray(values, dtype=np.float64)
    if not ((found >= 0) & (found <= 1)).all():
        raise InputError("the badness of each sample must be a number from 0 (good) to 1 (bad).")
    return found
