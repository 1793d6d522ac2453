"""The promise on misses and false blocks is kept over many splits, and a broken fit is found out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from calibration.labelled import risk_control
from calibration.labelled.risk_control import Bands, Promise, fewest, fit_bands, hits_allowed, measure
from safevlm.errors import InputError

SPLITS = 500
Fit = Callable[..., Bands]


def pool(seed: int, n: int = 3000) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.str_]]:
    """Return scores with ties, truth, and most probable harms, of which each is as hard as it likes."""
    rng = np.random.default_rng(seed)
    unsafe = rng.random(n) < 0.6
    harms = rng.choice(["weapon", "drug", "suicide"], size=n, p=[0.6, 0.35, 0.05])
    ease = np.select([harms == "weapon", harms == "drug"], [6.0, 2.5], 1.5)
    scores = np.where(unsafe, rng.beta(ease, 1.5), rng.beta(1.5, ease))
    return np.round(scores, 2), unsafe, harms


def simulate(
    promise: Promise, fit: Fit = fit_bands, *, n: int = 200, seed: int = 1, **options: bool
) -> dict[str, NDArray[np.float64]]:
    """Fit on ``n`` images of a pool, measure on the rest, over and over."""
    scores, unsafe, harms = pool(seed)
    rng = np.random.default_rng([seed, 2])
    found: dict[str, list[float]] = {"miss": [], "fpr": [], "weapon": []}
    for _ in range(SPLITS):
        order = rng.permutation(len(scores))
        use, rest = order[:n], order[n:]
        bands = fit(scores[use], unsafe[use], harms[use].tolist(), promise, **options)
        rates = measure(bands, scores[rest], unsafe[rest], harms[rest].tolist())
        found["miss"].append(rates.miss)
        found["fpr"].append(rates.fpr)
        weapon = rest[harms[rest] == "weapon"]
        found["weapon"].append(measure(bands, scores[weapon], unsafe[weapon], ["weapon"] * len(weapon)).miss)
    return {name: np.array(values) for name, values in found.items()}


def above(values: NDArray[np.float64], level: float) -> float:
    """Return by how many standard errors the mean lies above a level."""
    return float((values.mean() - level) / (values.std(ddof=1) / math.sqrt(len(values))))


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("per_class", [True, False])
def test_conformal_risk_control_keeps_the_mean_at_its_level(seed: int, per_class: bool) -> None:
    found = simulate(Promise(alpha=0.1, max_fpr=0.05), seed=seed, per_class=per_class)
    assert above(found["miss"], 0.1) < 3
    assert above(found["fpr"], 0.05) < 3
    assert found["miss"].mean() > 0.05  # and does not keep it by blocking everything
    if per_class:
        assert above(found["weapon"], 0.1) < 3


def test_learn_then_test_keeps_all_but_delta_of_the_splits_at_their_level() -> None:
    promise = Promise(alpha=0.1, max_fpr=0.1, method="learn_then_test", delta=0.1)
    found = simulate(promise, per_class=False)
    noise = 3 * math.sqrt(0.1 * 0.9 / SPLITS)
    assert (found["miss"] > 0.1).mean() < 0.1 + noise
    assert (found["fpr"] > 0.1).mean() < 0.1 + noise
    mean_only = simulate(Promise(alpha=0.1, max_fpr=0.1), per_class=False)
    assert (mean_only["miss"] > 0.1).mean() > 0.1 + noise  # the other method promises less, and this can tell


def overall_miss(promise: Promise, *, classes: int = 10, each: int = 7) -> NDArray[np.float64]:
    """Return the true miss rate over all classes of bands fitted to a few uniform scores of each, over and over."""
    harms = [f"harm {k}" for k in range(classes) for _ in range(2 * each)]
    unsafe = np.tile(np.arange(2 * each) < each, classes)
    rng = np.random.default_rng(5)
    found = []
    for _ in range(SPLITS):
        bands = fit_bands(rng.random(len(harms)), unsafe, harms, promise)
        found.append(float(bands.limits([f"harm {k}" for k in range(classes)])[0].mean()))
    return np.array(found)


def test_learn_then_test_keeps_its_level_over_all_classes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    promise = Promise(alpha=0.1, max_fpr=0.1, method="learn_then_test", delta=0.5)
    limit = 0.5 + 3 * math.sqrt(0.5 * 0.5 / SPLITS)
    assert (overall_miss(promise) > 0.1).mean() < limit
    monkeypatch.setattr(risk_control, "_for_each", lambda promise, _: promise)  # every class takes all of delta
    assert (overall_miss(promise) > 0.1).mean() > limit


def without_correction(n: int, level: float, promise: Promise) -> int:
    return math.floor(level * n) if promise.method == "conformal_risk_control" else 0


def off_by_two(n: int, level: float, promise: Promise) -> int:
    return math.floor(level * (n + 1)) + 1


@pytest.mark.parametrize("broken", [without_correction, off_by_two])
def test_a_broken_order_statistic_breaks_the_promise(
    broken: Callable[[int, float, Promise], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(risk_control, "hits_allowed", broken)
    found = simulate(Promise(alpha=0.1, max_fpr=0.1), n=60, per_class=False)
    assert above(found["miss"], 0.1) > 3 or above(found["fpr"], 0.1) > 3


def test_fitting_on_all_images_instead_of_unsafe_ones_breaks_the_promise() -> None:
    def on_all(scores: NDArray[np.float64], unsafe: NDArray[np.bool_], harms: Sequence[str], promise: Promise) -> Bands:
        fitted = fit_bands(scores, unsafe, harms, promise, per_class=False)
        lowest = float(np.sort(scores)[hits_allowed(len(scores), 0.5, promise)])
        return Bands(pooled=fitted.pooled.model_copy(update={"allow": lowest, "block": 1.0}), per_class={})

    assert above(simulate(Promise(alpha=0.1), on_all)["miss"], 0.1) > 3


def test_the_number_that_may_go_wrong_is_the_largest_that_the_definition_allows() -> None:
    for n in (10, 19, 20, 59, 200):
        for level in (0.05, 0.1, 0.25):
            k = hits_allowed(n, level, Promise())
            assert k == max([j for j in range(n) if (j + 1) / (n + 1) <= level + 1e-12], default=-1)
            tested = Promise(method="learn_then_test", delta=0.1)
            tails = np.cumsum([math.comb(n, j) * level**j * (1 - level) ** (n - j) for j in range(n)])
            assert hits_allowed(n, level, tested) == int((tails <= 0.1).sum()) - 1


@pytest.mark.parametrize("level", [0.999, 1 - 1e-15])
@pytest.mark.parametrize("method", ["conformal_risk_control", "learn_then_test"])
def test_levels_near_1_have_a_band_and_one_image_is_needed(level: float, method: risk_control.Method) -> None:
    promise = Promise(alpha=level, max_fpr=level, delta=level, method=method)
    for n in (2, 40, 1000):
        bands = fit_bands(np.linspace(0, 0.9, n), np.arange(n) % 2 == 0, ["x"] * n, promise)
        assert bands.pooled.n_unsafe == n // 2
    assert fewest(level, promise) >= 1


def test_the_fewest_images_are_the_fewest() -> None:
    for promise in (Promise(), Promise(method="learn_then_test", delta=0.05)):
        for level in (0.01, 0.05, 0.1, 0.3):
            needed = fewest(level, promise)
            assert hits_allowed(needed, level, promise) >= 0 > hits_allowed(needed - 1, level, promise)
    assert fewest(0.05, Promise()) == 19
    assert fewest(0.05, Promise(method="learn_then_test", delta=0.05)) == 59


def test_scores_at_a_threshold_fall_on_its_upper_side() -> None:
    scores = np.array([0.2] * 19 + [0.7] * 19)
    unsafe = np.array([False] * 19 + [True] * 19)
    bands = fit_bands(scores, unsafe, ["x"] * 38, Promise(), per_class=False)
    assert bands.pooled.allow == bands.pooled.block == 0.5  # between just above 0.2 and 0.7
    rates = measure(bands, scores, unsafe, ["x"] * 38)
    assert (rates.miss, rates.fpr, rates.unsure) == (0, 0, 0)


def test_a_guard_without_errors_is_not_made_to_miss_what_it_may() -> None:
    scores = np.concatenate([np.linspace(0, 0.1, 200), np.linspace(0.99, 1, 200)])
    unsafe = np.arange(400) >= 200
    bands = fit_bands(scores, unsafe, ["x"] * 400, Promise(alpha=0.1, max_fpr=0.1), per_class=False)
    assert bands.pooled.allow == bands.pooled.block == 0.5
    rates = measure(bands, scores, unsafe, ["x"] * 400)
    assert (rates.miss, rates.fpr, rates.unsure) == (0, 0, 0)


def test_a_threshold_that_could_never_block_is_not_fitted() -> None:
    scores, unsafe = np.ones(40), np.arange(40) < 20
    with pytest.raises(InputError, match=r"20 of 20 safe images have a p\(unsafe\) of 1, so no threshold"):
        fit_bands(scores, unsafe, ["x"] * 40, Promise(max_fpr=0.05), per_class=False)
    scores[0] = 0.999
    scores[20:] = np.nextafter(1, 0)
    assert fit_bands(scores, unsafe, ["x"] * 40, Promise(max_fpr=0.05), per_class=False).pooled.block <= 1


def test_rare_harms_share_a_band_with_enough_images() -> None:
    scores, unsafe, harms = pool(3, n=400)
    bands = fit_bands(scores, unsafe, harms.tolist(), Promise())
    assert "suicide" not in bands.per_class
    assert bands.pooled.n_unsafe >= 19
    assert bands.pooled.n_unsafe + sum(band.n_unsafe for band in bands.per_class.values()) == unsafe.sum()


def test_too_few_images_are_refused_with_the_number_needed() -> None:
    scores = np.linspace(0, 1, 30)
    for unsafe, kind in ((np.arange(30) < 10, "10 unsafe"), (np.arange(30) >= 10, "10 safe")):
        with pytest.raises(InputError, match=f"{kind} images are too few.*at least 19 are needed"):
            fit_bands(scores, unsafe, ["x"] * 30, Promise())


@pytest.mark.parametrize("wrong", [{"alpha": 0.0}, {"alpha": 1.0}, {"max_fpr": -0.1}, {"delta": 2.0}])
def test_a_level_outside_0_to_1_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match="above 0 and below 1"):
        Promise(**wrong)  # type: ignore[arg-type]
