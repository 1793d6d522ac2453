"""A change as a judge saw it, corrected for the judge's errors by a sample of answers that people labelled.

The judge's words about an answer before and after put it into one of four cells; people's labels say which share of
each cell is truly bad (double sampling: Tenenbein, J. Am. Stat. Assoc. 65, 1970, 1350-1361). Labels may be drawn in
any way that looks at type and cell alone: some cells may be labelled more than others. Two designs:

- ``alike``, labels of the baseline only: sensitivity and specificity follow from the cells, and the true change is the
  observed one / (sensitivity + specificity - 1) (Rogan and Gladen, Am. J. Epidemiology 107, 1978, 71-76). That holds
  when the judge errs alike in both runs, which such labels cannot show.
- ``each run``, labels of both runs: the sum over cells of their share times their true change. Errors may differ.

Bounds are quantiles of draws: shares of the cells from their posteriors, the observed change from its own bound.
*Bad* is 1. Shape suffixes: N answers, K types, C cells (good good, good bad, bad good, bad bad), D draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import Literal

import numpy as np
import numpy.typing as npt

from benchmarks.statistics.tango import one_sided_value

__all__ = ["CELLS", "Answers", "Corrected", "Correction", "Design", "Lacking"]

Floats = npt.NDArray[np.float64]
Whole = npt.NDArray[np.int64]
Design = Literal["alike", "each run"]

CELLS = 4
DRAWS = 20_000
FEWEST_OF_A_WORD = 10
"""Labels of each of the judge's words in the baseline, below which its errors are not estimated."""
FEWEST_OF_A_CELL = 3
BOUND_SHARE = 0.7
"""Share of a bound's allowed error at which its quantile is taken. At the full share bounds of some judges were
measured to lie below the truth up to a third more often than stated (``benchmarks/STATISTICS.md``)."""
LARGE_CELL = 0.05
"""Share of a group's answers from which a cell needs labels; smaller ones may go without, as wholly unknown."""
FEWEST_OF_A_TRUTH = 5
"""Truly bad (good) labelled answers of a type from which the type has a sensitivity (specificity) of its own."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Answers:
    """Pairs that ask for the same (all unsafe, or all harmless), as the judge and people see them.

    ``types`` and ``clusters`` (images) are N, the others N2, by run. ``labels`` is NaN where nobody looked. ``weights``
    says how many answers a label stands for, where those of one cell were not drawn alike (by another judge's words):
    such labels count as fewer (Kish, Survey Sampling, 1965).
    """

    types: Whole
    clusters: Whole
    words: npt.NDArray[np.bool_]
    labels: Floats
    weights: Floats | None = None

    @property
    def cells(self) -> Whole:
        """The cell of each answer: N."""
        found: Whole = 2 * self.words[:, 0].astype(np.int64) + self.words[:, 1]
        return found


@dataclass(frozen=True, kw_only=True)
class Corrected:
    """A corrected change, positive is worse, and where it lies: both ends hold by themselves at the bounds' level."""

    change: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Lacking:
    """Labels that a design needs and has not: of a run's answers whose words are these (None: any)."""

    words: tuple[bool | None, bool | None]
    run: Literal["baseline", "candidate"]
    have: int
    needed: int


class Correction:
    """What labels say of a judge in one group of pairs. ``factor``: as if there were so many times the labels."""

    def __init__(self, answers: Answers, *, draws: int = DRAWS, seed: int = 0, factor: float = 1.0) -> None:
        self.answers = answers
        self.types = int(answers.types.max()) + 1
        self._factor, self._draws, self._seed = factor, draws, seed
        self.rows_KC = self._counts(np.ones(len(answers.types), bool))
        self.labelled_2KC2 = np.stack([self._weighed(answers.labels[:, run], run, (0, 1)) for run in (0, 1)])

    @cached_property
    def design(self) -> Design | None:
        """The better design that the labels allow, None where they allow neither."""
        if not self.lacking("each run"):
            return "each run"
        return None if self.lacking("alike") else "alike"

    def lacking(self, design: Design) -> tuple[Lacking, ...]:
        """Return which labels a design lacks."""
        rows_C, labelled_2C = self.rows_KC.sum(axis=0), self.labelled_2KC2.sum(axis=(1, 3))
        found: list[Lacking] = []
        names: tuple[Literal["baseline", "candidate"], ...] = ("baseline", "candidate")
        for run, name in enumerate(names[: 1 if design == "alike" else 2]):
            for cell in range(CELLS):
                if rows_C[cell] >= LARGE_CELL * rows_C.sum():
                    words = bool(cell // 2), bool(cell % 2)
                    found += _lack(words, name, labelled_2C[run, cell], rows_C[cell], FEWEST_OF_A_CELL)
        if design == "alike":
            for word in (False, True):
                own = slice(2 * word, 2 * word + 2)
                found += _lack((word, None), "baseline", labelled_2C[0, own].sum(), rows_C[own].sum(), FEWEST_OF_A_WORD)
        return tuple(found)

    @cached_property
    def quality(self) -> Floats:
        """Draws of sensitivity and specificity in the baseline, 2DK; a type's own, where it has labels for that."""
        bad_DKC = self._shares(0)
        found = []
        for truth, own in ((1, slice(2, 4)), (0, slice(0, 2))):
            there_DKC = self.rows_KC * (bad_DKC if truth else 1 - bad_DKC)
            right_DK, all_DK = there_DKC[..., own].sum(axis=-1), there_DKC.sum(axis=-1)
            pooled_D = _share(right_DK.sum(axis=1), all_DK.sum(axis=1))
            alone_DK = _share(right_DK, all_DK)
            enough_K = self.labelled_2KC2[0, ..., truth].sum(axis=1) >= FEWEST_OF_A_TRUTH
            found.append(np.where(enough_K, alone_DK, pooled_D[:, None]))
        return np.stack(found)

    @cached_property
    def _changes(self) -> Floats:
        """Draws of the true change in each cell, DKC; from answers labelled in both runs where these are the most."""
        before_DKC, after_DKC = self._shares(0), self._shares(1)
        labels = self.answers.labels
        pairs_KC3 = self._weighed(labels[:, 1] - labels[:, 0], 0, (-1, 0, 1))
        fewer_KC = self.labelled_2KC2.sum(axis=-1).min(axis=0)
        paired_KC = 2 * pairs_KC3.sum(axis=-1) >= np.maximum(fewer_KC, 1)
        counts_KC3 = self._factor * pairs_KC3 + _prior(pairs_KC3)
        parts = self._rng(2).standard_gamma(counts_KC3, (self._draws, *pairs_KC3.shape))
        parts /= parts.sum(axis=-1, keepdims=True)
        return np.where(paired_KC, parts[..., 2] - parts[..., 0], after_DKC - before_DKC)

    def change(self, weights_K: npt.ArrayLike, upper: float, confidence: float) -> Corrected | None:
        """Return the corrected weighted sum of types' changes, whose observed one has this upper bound.

        None where the labels cannot correct it: too few of them, or a judge that may be no better than chance.
        """
        if self.design is None:
            return None
        weights, z = np.asarray(weights_K, np.float64), one_sided_value(confidence)
        draws_D = self._alike(weights, upper, z) if self.design == "alike" else self._each_run(weights)
        level = 1 - BOUND_SHARE * NormalDist().cdf(-z)
        unknown = np.isnan(draws_D)
        low = float(np.quantile(np.where(unknown, -np.inf, draws_D), 1 - level, method="lower"))
        high = float(np.quantile(np.where(unknown, np.inf, draws_D), level, method="higher"))
        if not np.isfinite([low, high]).all():
            return None
        return Corrected(change=float(np.nanmedian(draws_D)), low=low, high=high)

    def rates(self) -> tuple[Floats, Floats] | None:
        """Return draws of the true share of bad answers in this group, before and after; None without a design."""
        if self.design is None:
            return None
        share_C = self.rows_KC / self.rows_KC.sum()
        before_D = np.einsum("kc,dkc->d", share_C, self._shares(0))
        if self.design == "each run":
            return before_D, np.einsum("kc,dkc->d", share_C, self._shares(1))
        se_D, sp_D = self.quality.mean(axis=2)
        seen = self.answers.words[:, 1].mean()
        with np.errstate(divide="ignore"):
            after_D = np.where(se_D + sp_D > 1, (seen + sp_D - 1) / (se_D + sp_D - 1), np.inf)
        return before_D, after_D

    def _alike(self, weights_K: Floats, upper: float, z: float) -> Floats:
        """Return draws of sum_k w_k d_k / J_k, NaN for a judge no better than chance, behind whom any change may be.

        The spread of d is that which its upper bound states.
        """
        worsening_N = self.answers.words[:, 1].astype(np.float64) - self.answers.words[:, 0]
        mean_K = self._means(worsening_N)
        skill_DK = self.quality.sum(axis=0) - 1
        likely_K = np.median(skill_DK, axis=0)
        if (likely_K[weights_K > 0] <= 0).any():
            return np.full(self._draws, np.nan)
        shown_K = np.divide(weights_K, likely_K, out=np.zeros_like(weights_K), where=weights_K > 0)
        plain = self._error(worsening_N, weights_K)
        scale = self._error(worsening_N, shown_K) / plain if plain > 0 else shown_K.max() / weights_K.max()
        spread = (upper - float(weights_K @ mean_K)) / z * scale
        normal_D = self._rng(3).standard_normal(self._draws)
        over_DK = mean_K + spread * likely_K * normal_D[:, None]
        used = weights_K > 0
        parts_DK = np.divide(over_DK, skill_DK, out=np.full_like(over_DK, np.nan), where=skill_DK > 0)
        found: Floats = (parts_DK[:, used] * weights_K[used]).sum(axis=1)
        return found

    def _each_run(self, weights_K: Floats) -> Floats:
        """Return draws of sum_k w_k sum_c share_kc * true change_kc; which cell an answer is in was drawn, too."""
        size_K1 = np.maximum(self.rows_KC.sum(axis=1, keepdims=True), 1)
        drawn_D = np.einsum("k,kc,dkc->d", weights_K, self.rows_KC / size_K1, self._changes)
        mean_KC = self._changes.mean(axis=0)
        spread = self._error(mean_KC[self.answers.types, self.answers.cells], weights_K)
        found: Floats = drawn_D + spread * self._rng(3).standard_normal(self._draws)
        return found

    def _shares(self, run: int) -> Floats:
        """Draw the share of truly bad answers in each type and cell of one run: DKC."""
        labelled_KC2 = self.labelled_2KC2[run]
        good_KC, bad_KC = np.moveaxis(self._factor * labelled_KC2 + _prior(labelled_KC2), -1, 0)
        found: Floats = self._rng(run).beta(bad_KC, good_KC, (self._draws, *bad_KC.shape))
        return found

    def _rng(self, part: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, 17, part])

    def _weighed(self, said_N: Floats, run: int, values: Sequence[float]) -> Floats:
        """Return how many labels say each of the ``values``, as of a sample in which all weigh alike: KC and values."""
        weights = self.answers.weights
        weight_N = np.ones(len(said_N)) if weights is None else weights[:, run]
        sums = np.stack([self._counts(said_N == value, weight_N) for value in values], axis=-1)
        squares_KC = self._counts(np.isin(said_N, values), weight_N**2)[..., None]
        share = np.divide(
            sums.sum(axis=-1, keepdims=True), squares_KC, out=np.zeros_like(squares_KC), where=squares_KC > 0
        )
        found: Floats = sums * share
        return found

    def _counts(self, chosen_N: npt.NDArray[np.bool_], weight_N: Floats | None = None) -> Floats:
        places = (self.answers.types * CELLS + self.answers.cells)[chosen_N]
        weights = None if weight_N is None else weight_N[chosen_N]
        found: Floats = np.bincount(places, weights, self.types * CELLS).reshape(self.types, CELLS).astype(np.float64)
        return found

    def _means(self, values_N: Floats) -> Floats:
        sums_K = np.bincount(self.answers.types, values_N, self.types)
        found: Floats = sums_K / np.maximum(np.bincount(self.answers.types, minlength=self.types), 1)
        return found

    def _error(self, values_N: Floats, weights_K: Floats) -> float:
        """Return the standard error of a weighted sum of types' means, images drawn."""
        types = self.answers.types
        off_N = (values_N - self._means(values_N)[types]) * (
            weights_K / np.maximum(np.bincount(types, minlength=self.types), 1)
        )[types]
        return float(np.sqrt(np.square(np.bincount(self.answers.clusters, off_N)).sum()))


def _share(part: Floats, whole: Floats) -> Floats:
    """Return part / whole; 0 of nothing: what was never seen is not taken for known."""
    found: Floats = np.divide(part, whole, out=np.zeros_like(whole), where=whole > 0)
    return found


def _prior(counts: Floats) -> Floats:
    """Return what is thought of each type's cell before its own labels, worth one: what other types' labels say.

    Without other labels all outcomes (the last axis) are equally likely: of two, that is Jeffreys' prior.
    """
    others = counts.sum(axis=0) - counts + 1 / counts.shape[-1]
    found: Floats = others / others.sum(axis=-1, keepdims=True)
    return found


def _lack(
    words: tuple[bool | None, bool | None],
    run: Literal["baseline", "candidate"],
    have: float,
    rows: float,
    fewest: int,
) -> list[Lacking]:
    needed = int(min(fewest, rows))
    return [Lacking(words=words, run=run, have=round(have), needed=needed)] if round(have) < needed else []
