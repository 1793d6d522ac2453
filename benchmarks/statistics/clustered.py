"""Inference that knows of clusters: several questions share an image, so images are drawn and swapped as a whole.

The statistic is a weighted sum of means: of each stratum's (a pair type's) mean worsening. Shape suffixes: N samples,
C clusters, S strata, R runs (a simulation brings many at once, a report one), D draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from benchmarks.statistics.tango import critical_value, one_sided_value, tango_bound, tango_interval
from safevlm.errors import InputError

__all__ = [
    "DRAWS",
    "FEWEST_CHANGED_CLUSTERS",
    "Bootstrapped",
    "Clusters",
    "bootstrap_bounds",
    "sign_flip_p",
]

DRAWS = 10_000
FEWEST_CHANGED_CLUSTERS = 10
"""Changed clusters below which a resample cannot tell how far unseen changes reach; from there on it reaches
further than data without a change would, where changes are of size 1."""
BOUND_SHARE = 0.85
"""Share of the bound's allowed error at which its quantile is taken: at the full share it was measured to lie below the
truth up to a seventh more often than stated (``benchmarks/STATISTICS.md``)."""
_CHUNK = 500
"""Draws at a time: 500 x 1,791 counts take 4 MB."""
_NORMAL = NormalDist()
_TIE = 1e-9
"""Relative: sums of the same numbers in another order differ by rounding, and are ties."""

Floats = npt.NDArray[np.float64]


class Clusters:
    """Which cluster and stratum each sample belongs to, and what each stratum's mean weighs.

    ``strata_N`` and ``clusters_N`` may hold any values that compare; ``weights`` goes by stratum, as a mapping or in
    the order of the sorted strata.

    Raises InputError for no sample, unequal lengths, or weights that do not fit the strata.
    """

    def __init__(
        self, strata_N: npt.ArrayLike, clusters_N: npt.ArrayLike, weights: Mapping[int, float] | npt.ArrayLike
    ) -> None:
        names_S, strata = np.unique(np.asarray(strata_N), return_inverse=True)
        names_C, clusters = np.unique(np.asarray(clusters_N), return_inverse=True)
        if len(strata) != len(clusters) or not len(strata):
            raise InputError(f"{len(strata)} strata and {len(clusters)} clusters; each sample needs one of both.")
        self.n = len(strata)
        self.counts_CS = np.zeros((len(names_C), len(names_S)))
        np.add.at(self.counts_CS, (clusters, strata), 1.0)
        self.sizes_S: Floats = self.counts_CS.sum(axis=0)
        self.weights_S = _weights(weights, [name.item() for name in names_S])
        cells = clusters * len(names_S) + strata
        self._order = np.argsort(cells, kind="stable")
        self._cells, self._starts = np.unique(cells[self._order], return_index=True)

    @property
    def span(self) -> float:
        """The largest the statistic can be, where no difference is above 1."""
        return float(np.abs(self.weights_S).sum())

    def sums(self, differences_NR: Floats) -> Floats:
        """Return the sum of differences in each cluster and stratum: CSR."""
        n, runs = differences_NR.shape
        if n != self.n:
            raise InputError(f"{n} differences for {self.n} samples; each sample needs one.")
        sums = np.zeros((self.counts_CS.size, runs))
        sums[self._cells] = np.add.reduceat(differences_NR[self._order], self._starts, axis=0)
        return sums.reshape(*self.counts_CS.shape, runs)

    def estimate(self, sums_CSR: Floats) -> Floats:
        """Return the statistic of each run: R."""
        found: Floats = (self.weights_S / self.sizes_S) @ sums_CSR.sum(axis=0)
        return found

    def floor(self, sums_CSR: Floats, width: Callable[[float], float]) -> Floats:
        """Return the least distance between estimate and an end of an interval, for each run: R.

        Data without a change give a bootstrap of no width, as if a handful of samples could prove anything. Tango's
        end for no change, with clusters as its samples, is the ``width`` that such data do have. It counts in strata
        where fewer than :data:`FEWEST_CHANGED_CLUSTERS` changed; strata are combined as independent ones (squares add).
        """
        widths = [width(float(count)) for count in (self.counts_CS > 0).sum(axis=0)]
        few_SR = (sums_CSR != 0).sum(axis=0) < FEWEST_CHANGED_CLUSTERS
        found: Floats = np.sqrt(np.square(self.weights_S * np.array(widths)) @ few_SR)
        return found


@dataclass(frozen=True, kw_only=True, eq=False)
class Bootstrapped:
    """A two-sided interval, the one-sided upper bound and the standard error, each R."""

    low: Floats
    high: Floats
    bound: Floats
    error: Floats
    nearest: Floats
    """The least distance between estimate and bound."""


def bootstrap_bounds(where: Clusters, sums_CSR: Floats, *, draws: int, seed: int, confidence: float) -> Bootstrapped:
    """Return interval and bound at ``confidence``. All runs share the clusters drawn.

    The BCa bootstrap of sum_s weights[s] * mean(differences in s), whole clusters drawn again. BCa corrects percentiles
    for bias and skewness (Efron, J. Am. Stat. Assoc. 82, 1987, 171-185): few changes make skew draws, whose plain
    percentiles were measured to end too low. Draws in which a stratum has no sample are left out. No end comes
    nearer to the estimate than :meth:`Clusters.floor`. Own code: scipy's bootstrap knows no clusters, and holds all
    draws in memory; a test holds the two equal where each sample is its own cluster.

    Raises InputError for fewer than two draws.
    """
    if draws < 2:
        raise InputError(f"{draws} draws are too few. Give at least two, and some thousands for an interval.")
    z, single = critical_value(confidence), one_sided_value(1 - BOUND_SHARE * (1 - confidence))
    around_R = where.floor(sums_CSR, lambda n: tango_interval(0, 0, n, confidence=confidence)[1])
    above_R = where.floor(sums_CSR, lambda n: tango_bound(0, 0, n, confidence=confidence))
    estimate_R = where.estimate(sums_CSR)
    stack = [_statistics(where, counts_DC, sums_CSR) for counts_DC in _resampled(len(sums_CSR), draws, seed)]
    found_DR = np.concatenate(stack)
    if len(found_DR) < 2:  # every draw left a stratum without a sample: such data prove nothing
        wide = np.full(len(estimate_R), where.span)
        unknown = np.full(len(estimate_R), np.inf)
        return Bootstrapped(low=-wide, high=wide, bound=wide, error=unknown, nearest=above_R)
    found_DR.sort(axis=0)
    bias_R, skew_R = _bias(found_DR, estimate_R), _skew(where, sums_CSR)
    low, high, bound = (_at(found_DR, _corrected(end, bias_R, skew_R)) for end in (-z, z, single))
    return Bootstrapped(
        low=np.maximum(np.minimum(low, estimate_R - around_R), -where.span),
        high=np.minimum(np.maximum(high, estimate_R + around_R), where.span),
        bound=np.minimum(np.maximum(bound, estimate_R + above_R), where.span),
        error=found_DR.std(axis=0, ddof=1),
        nearest=above_R,
    )


def sign_flip_p(where: Clusters, sums_CSR: Floats, *, draws: int, seed: int) -> Floats:
    """Return, for each run, the two-sided p of the test that swaps before and after of whole clusters: R.

    Exact, whatever the dependence within a cluster, under "which run is which makes no difference": the data
    themselves count as one of the draws + 1 (Phipson and Smyth, Stat. Appl. Genet. Mol. Biol. 9, 2010, article 39).
    """
    parts_CR: Floats = np.einsum("s,csr->cr", where.weights_S / where.sizes_S, sums_CSR)
    moved = np.flatnonzero(parts_CR.any(axis=1))
    seen_R = np.abs(parts_CR.sum(axis=0))
    as_far_R = np.zeros(parts_CR.shape[1])
    rng = np.random.default_rng([seed, 2])
    for size in _chunks(draws):
        signs_DC = _signs(rng, size, len(parts_CR))[:, moved]
        as_far_R += (np.abs(signs_DC @ parts_CR[moved]) >= seen_R * (1 - _TIE)).sum(axis=0)
    return (1 + as_far_R) / (1 + draws)


def _statistics(where: Clusters, counts_DC: npt.NDArray[np.float32], sums_CSR: Floats) -> Floats:
    """Return the statistic of each draw in which all strata have a sample, for each run: DR."""
    clusters, strata, runs = sums_CSR.shape
    sizes_DS = counts_DC @ where.counts_CS.astype(np.float32)
    usable = (sizes_DS > 0).all(axis=1)
    # Sums of whole numbers are exact in 32 bits, in half the time.
    kind: type[np.floating] = np.float32 if (sums_CSR == np.rint(sums_CSR)).all() else np.float64
    flat = sums_CSR.reshape(clusters, strata * runs).astype(kind)
    sums_DSR = np.asarray(counts_DC[usable].astype(kind) @ flat, dtype=np.float64).reshape(-1, strata, runs)
    shares_DS = where.weights_S / sizes_DS[usable]
    found: Floats = np.einsum("ds,dsr->dr", shares_DS, sums_DSR)
    return found


def _bias(found_DR: Floats, estimate_R: Floats) -> Floats:
    """Return BCa's z0: the normal quantile of the share of draws below the estimate, ties counted half."""
    draws = len(found_DR)
    near = np.abs(estimate_R) * _TIE + 1e-15
    below = (found_DR < estimate_R - near).sum(axis=0) + (found_DR <= estimate_R + near).sum(axis=0)
    return np.array([_NORMAL.inv_cdf(min(max(each, 1), 2 * draws - 1) / (2 * draws)) for each in below])


def _skew(where: Clusters, sums_CSR: Floats) -> Floats:
    """Return BCa's acceleration: a sixth of the skewness of the statistics that leave one cluster out each."""
    total_SR, kept_CS = sums_CSR.sum(axis=0), where.sizes_S - where.counts_CS
    shares_CS = np.divide(where.weights_S, kept_CS, out=np.zeros_like(kept_CS), where=kept_CS > 0)
    # sum of a stratum without the cluster, over its size without it: in two parts, which keeps the arrays small
    left_CR = shares_CS @ total_SR - np.einsum("cs,csr->cr", shares_CS, sums_CSR)
    off_CR = left_CR.mean(axis=0) - left_CR
    squares_R = np.square(off_CR).sum(axis=0)
    cubes_R = (off_CR**3).sum(axis=0)
    found: Floats = np.zeros_like(cubes_R)
    np.divide(cubes_R, 6 * squares_R**1.5, out=found, where=squares_R > 1e-18)
    return found


def _corrected(z: float, bias_R: Floats, skew_R: Floats) -> Floats:
    """Return which quantile of the draws stands for the normal quantile ``z``: R."""
    shifted = bias_R + z
    room = 1 - skew_R * shifted
    moved = np.divide(shifted, room, out=np.full_like(shifted, math.copysign(math.inf, z)), where=room > 0)
    return np.array([_NORMAL.cdf(each) for each in bias_R + moved])


def _at(sorted_DR: Floats, quantile_R: Floats) -> Floats:
    """Return each run's quantile of its sorted draws, between two of them in proportion."""
    place = quantile_R * (len(sorted_DR) - 1)
    lower = np.minimum(place.astype(np.intp), len(sorted_DR) - 2)
    runs = np.arange(sorted_DR.shape[1])
    below, above = sorted_DR[lower, runs], sorted_DR[lower + 1, runs]
    found: Floats = below + (place - lower) * (above - below)
    return found


def _resampled(clusters: int, draws: int, seed: int) -> Iterator[npt.NDArray[np.float32]]:
    """Yield how often each cluster was drawn, a chunk of draws at a time: DC."""
    rng = np.random.default_rng([seed, 1])
    for size in _chunks(draws):
        drawn = rng.integers(0, clusters, (size, clusters)) + clusters * np.arange(size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=size * clusters).reshape(size, clusters).astype(np.float32)


def _signs(rng: np.random.Generator, draws: int, clusters: int) -> Floats:
    """Return a fair + 1 or - 1 for each draw and cluster: DC."""
    bits = np.frombuffer(rng.bytes(draws * -(-clusters // 8)), dtype=np.uint8).reshape(draws, -1)
    return np.where(np.unpackbits(bits, axis=1)[:, :clusters], 1.0, -1.0)


def _chunks(draws: int) -> Iterator[int]:
    for start in range(0, draws, _CHUNK):
        yield min(_CHUNK, draws - start)


def _weights(weights: Mapping[int, float] | npt.ArrayLike, names: list[int]) -> Floats:
    if isinstance(weights, Mapping):
        missing = [name for name in names if name not in weights]
        if missing:
            raise InputError(f"stratum {missing[0]} has no weight; each of {names} needs one.")
        weights = [weights[name] for name in names]
    found: Floats = np.asarray(weights, dtype=np.float64)
    if found.shape != (len(names),):
        raise InputError(f"weights of shape {found.shape} for {len(names)} strata; each stratum needs one.")
    return found
