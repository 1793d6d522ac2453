"""The promise on misses is kept under every declared corruption, and not without declaring them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from calibration.labelled import risk_control
from calibration.labelled.risk_control import Bands, Promise, Seen, fit_bands, hits_allowed, measure
from safevlm.errors import InputError

SPLITS, POOL, N, ALPHA = 200, 3000, 240, 0.1
SHIFTS = {"jpeg:50": 0.1, "blur:1.5": 0.25, "noise:10": 0.22}
"""By how much a corruption lowers the scores of unsafe images; which image suffers most differs."""
Flags = NDArray[np.bool_]


def table(seed: int) -> tuple[list[Seen], Flags]:
    """Return what a guard makes of a pool as it is and under each corruption: scores with ties, moving harms."""
    rng = np.random.default_rng(seed)
    unsafe = rng.random(POOL) < 0.6
    harms = rng.choice(["weapon", "drug", "suicide"], size=POOL, p=[0.5, 0.4, 0.1])
    base = np.where(unsafe, rng.beta(4.0, 1.5, POOL), rng.beta(1.5, 4.0, POOL))
    seen = [Seen(np.round(base, 2), harms.tolist())]
    for shift in SHIFTS.values():
        scores = np.clip(base - np.where(unsafe, shift * rng.random(POOL) * 2, 0), 0, 1)
        moved = np.where(rng.random(POOL) < 0.2, rng.permutation(harms), harms)
        seen.append(Seen(np.round(scores, 2), moved.tolist()))
    return seen, unsafe


def part(seen: Seen, chosen: NDArray[np.int64]) -> Seen:
    return Seen(seen.scores[chosen], [seen.harms[at] for at in chosen])


def resplit(promise: Promise, *, declared: bool, per_class: bool = True, seed: int = 1) -> NDArray[np.float64]:
    """Return miss rates on the rest of the pool of bands fitted on ``N`` images: SPLITS x (as it is, corruptions)."""
    seen, unsafe = table(seed)
    rng = np.random.default_rng([seed, 2])
    found = []
    for _ in range(SPLITS):
        order = rng.permutation(POOL)
        use, rest = order[:N], order[N:]
        own = [part(each, use) for each in seen]
        bands = fit_bands(
            *(own[0].scores, unsafe[use], own[0].harms, promise),
            per_class=per_class,
            under=own[1:] if declared else (),
        )
        found.append([missed(bands, part(each, rest), unsafe[rest]) for each in seen])
    return np.array(found)


def missed(bands: Bands, seen: Seen, unsafe: Flags) -> float:
    return measure(bands, seen.scores, unsafe, seen.harms).miss


def above(rates: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return by how many standard errors each mean lies above alpha."""
    errors = rates.std(axis=0, ddof=1) / math.sqrt(len(rates))
    return np.asarray((rates.mean(axis=0) - ALPHA) / errors)


@pytest.mark.parametrize("per_class", [True, False])
def test_the_promise_is_kept_under_each_declared_corruption(per_class: bool) -> None:
    rates = resplit(Promise(alpha=ALPHA), declared=True, per_class=per_class)
    assert (above(rates) < 3).all()
    assert rates.mean(axis=0).max() > ALPHA / 2, "and not by allowing nothing"


def test_thresholds_fitted_without_the_corruptions_break_it_under_each() -> None:
    rates = resplit(Promise(alpha=ALPHA), declared=False)
    assert above(rates)[0] < 3
    assert (above(rates)[1:] > 3).all()


def test_with_learn_then_test_at_most_delta_of_the_splits_break_it_under_each() -> None:
    promise = Promise(alpha=ALPHA, method="learn_then_test", delta=0.1)
    noise = 3 * math.sqrt(0.1 * 0.9 / SPLITS)
    kept = resplit(promise, declared=True, per_class=False)
    assert ((kept > ALPHA).mean(axis=0) < 0.1 + noise).all()
    alone = resplit(promise, declared=False, per_class=False)
    assert ((alone > ALPHA).mean(axis=0)[1:] > 0.1 + noise).all()


def test_the_average_over_corruptions_instead_of_the_worst_breaks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = risk_control._band

    def averaged(unsafe_scores: Sequence[NDArray[np.float64]], *rest: object) -> object:
        return honest([np.concatenate(list(unsafe_scores))], *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(risk_control, "_band", averaged)
    assert above(resplit(Promise(alpha=ALPHA), declared=True, per_class=False)).max() > 3


def test_the_limit_is_the_least_of_those_fitted_alone() -> None:
    seen, unsafe = table(3)
    promise = Promise(alpha=ALPHA, max_fpr=0.3)
    alone = [fit_bands(each.scores, unsafe, each.harms, promise, per_class=False).pooled for each in seen]
    ranks = [float(np.sort(each.scores[unsafe])[hits_allowed(int(unsafe.sum()), ALPHA, promise)]) for each in seen]
    together = fit_bands(*(seen[0].scores, unsafe, seen[0].harms, promise), per_class=False, under=seen[1:]).pooled
    assert together.allow <= min(ranks)
    if min(ranks) < alone[0].block:
        assert together.allow == min(ranks)
    same = fit_bands(*(seen[0].scores, unsafe, seen[0].harms, promise), per_class=False, under=[seen[0]] * 3).pooled
    assert same == alone[0], "a corruption that changes nothing changes no band"


def test_a_class_has_a_band_of_its_own_only_where_it_has_enough_images_under_each_corruption() -> None:
    scores, unsafe = np.linspace(0, 1, 120), np.arange(120) % 2 == 0
    harms = ["weapon" if at < 60 else "drug" for at in range(120)]
    fit = fit_bands(scores, unsafe, harms, Promise(), under=[Seen(scores, harms)])
    assert len(fit.per_class) == 1
    vanished = fit_bands(scores, unsafe, harms, Promise(), under=[Seen(scores, ["drug"] * 120)])
    assert "weapon" not in vanished.per_class


def test_too_few_images_are_refused_whatever_the_guard_says() -> None:
    with pytest.raises(InputError, match=r"18 unsafe images are too few .* at least 19 are needed"):
        risk_control.check_feasible(18, 500, Promise())
    risk_control.check_feasible(19, 19, Promise())
