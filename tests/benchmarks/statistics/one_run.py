"""Bootstrap and swapping of one run's differences: what ``clustered`` does for many runs at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from benchmarks.statistics.clustered import DRAWS, Clusters, bootstrap_bounds, sign_flip_p

Weights = Mapping[int, float] | npt.ArrayLike


@dataclass(frozen=True, kw_only=True)
class BootstrapResult:
    """A statistic, its two-sided interval, its one-sided upper bound and its standard error."""

    estimate: float
    interval: tuple[float, float]
    bound: float
    standard_error: float

    @property
    def upper(self) -> float:
        """The interval's upper end."""
        return self.interval[1]


def cluster_bootstrap(
    differences: npt.ArrayLike,
    strata: npt.ArrayLike,
    clusters: npt.ArrayLike,
    weights: Weights,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> BootstrapResult:
    where = Clusters(strata, clusters, weights)
    sums = where.sums(np.asarray(differences, np.float64)[:, None])
    found = bootstrap_bounds(where, sums, draws=draws, seed=seed, confidence=0.95)
    return BootstrapResult(
        estimate=float(where.estimate(sums)[0]),
        interval=(float(found.low[0]), float(found.high[0])),
        bound=float(found.bound[0]),
        standard_error=float(found.error[0]),
    )


def cluster_sign_flip(
    differences: npt.ArrayLike,
    strata: npt.ArrayLike,
    clusters: npt.ArrayLike,
    weights: Weights,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> float:
    where = Clusters(strata, clusters, weights)
    sums = where.sums(np.asarray(differences, np.float64)[:, None])
    return float(sign_flip_p(where, sums, draws=draws, seed=seed)[0])
