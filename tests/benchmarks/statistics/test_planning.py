"""Plans come true: that margin is proven so often, so many samples bring the bound below it."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.statistics.planning import resolvable_margin, samples_needed
from benchmarks.statistics.tango import tango_bound
from safevlm.errors import InputError


@pytest.mark.parametrize(("changed", "n"), [(104, 718), (300, 971), (40, 1500)])
@pytest.mark.parametrize("power", [0.6, 0.8, 0.95])
def test_the_resolvable_margin_is_proven_as_often_as_stated(changed: int, n: int, power: float) -> None:
    margin = resolvable_margin(changed // 2, changed - changed // 2, n, power=power)
    rng = np.random.default_rng(0)
    total = rng.binomial(n, changed / n, 2000)
    worse = rng.binomial(total, 0.5)
    proven = [tango_bound(int(w), int(t - w), n) <= margin + 1e-12 for w, t in zip(worse, total, strict=True)]
    assert np.mean(proven) == pytest.approx(power, abs=0.06)


def test_it_shrinks_with_samples_grows_with_churn_and_has_a_floor() -> None:
    margins = [resolvable_margin(k, k, 40 * k) for k in (2, 10, 50, 200)]
    assert (np.diff(margins) < 0).all()
    assert (np.diff([resolvable_margin(k, k, 500) for k in range(0, 200, 10)]) > 0).all()
    assert resolvable_margin(0, 0, 285) == pytest.approx(tango_bound(0, 0, 285))
    assert 0.9 < resolvable_margin(1, 0, 1) <= 1
    with pytest.raises(InputError, match="above 0 and below 1"):
        resolvable_margin(1, 1, 10, power=1)


@pytest.mark.parametrize(
    ("worse", "better", "n", "margin"), [(62, 62, 718, 0.02), (13, 10, 200, 0.05), (0, 0, 50, 0.01)]
)
def test_the_samples_needed_settle_it_four_times_in_five(worse: int, better: int, n: int, margin: float) -> None:
    needed = samples_needed(worse, better, n, margin)
    assert needed is not None
    tables = np.random.default_rng(0).multinomial(needed, [worse / n, better / n, 1 - (worse + better) / n], 3000)
    settled = np.mean([tango_bound(int(w), int(b), needed) < margin for w, b, _ in tables])
    assert settled >= 0.78
    assert settled <= 0.84 or worse == better == 0  # and not by asking for far too many


def test_more_power_asks_for_more_and_half_is_a_coin_toss() -> None:
    half, most, more = (samples_needed(62, 55, 718, 0.03, power=power) for power in (0.5, 0.8, 0.95))
    assert half is not None and most is not None and more is not None and half < most < more
    tables = np.random.default_rng(0).multinomial(half, [62 / 718, 55 / 718, 601 / 718], 3000)
    assert 0.45 < np.mean([tango_bound(int(w), int(b), half) < 0.03 for w, b, _ in tables]) < 0.55


def test_no_number_of_samples_proves_what_is_not_so() -> None:
    assert samples_needed(20, 10, 100, 0.1) is None
    assert samples_needed(20, 10, 100, 0.05) is None
    assert samples_needed(5, 10, 100, 0.1, change=0.2) is None
    assert samples_needed(100_001, 0, 1_000_000, 0.100001000001) is None  # beyond any number worth planning


def test_a_mean_over_types_and_a_wider_bound_ask_for_more() -> None:
    plain = samples_needed(62, 62, 718, 0.02)
    assert plain is not None
    moved = samples_needed(62, 62, 718, 0.02, change=0.005)
    assert moved is not None and moved > plain
    clustered = samples_needed(62, 62, 718, 0.02, upper=0.08)
    assert clustered == pytest.approx(718 * 16 * ((1.6449 + 0.8416) / 1.6449) ** 2, rel=1e-3)  # power 0.8
    assert samples_needed(62, 62, 718, 0.02, upper=0.0201) == plain  # Tango's is what is missing then


def test_a_change_that_the_counts_could_not_show_is_borne() -> None:
    assert samples_needed(0, 0, 100, 0.05, change=0.02) is not None
