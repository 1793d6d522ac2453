"""Plans come true: that margin is proven so often, so many samples bring the bound below it."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from benchmarks.statistics.planning import resolvable_margin, samples_needed
from benchmarks.statistics.tango import tango_interval, tango_z, unchanged_width
from safevlm.errors import InputError


@pytest.mark.parametrize(("changed", "n"), [(104, 718), (300, 971), (40, 1500)])
@pytest.mark.parametrize("power", [0.6, 0.8, 0.95])
def test_the_resolvable_margin_is_proven_as_often_as_stated(changed: int, n: int, power: float) -> None:
    margin = resolvable_margin(changed // 2, changed - changed // 2, n, power=power)
    rng = np.random.default_rng(0)
    total = rng.binomial(n, changed / n, 2000)
    worse = rng.binomial(total, 0.5)
    proven = [norm.cdf(tango_z(int(w), int(t - w), n, margin)) < 0.025 for w, t in zip(worse, total, strict=True)]
    assert np.mean(proven) == pytest.approx(power, abs=0.06)


def test_it_shrinks_with_samples_grows_with_churn_and_has_a_floor() -> None:
    margins = [resolvable_margin(k, k, 40 * k) for k in (2, 10, 50, 200)]
    assert (np.diff(margins) < 0).all()
    assert (np.diff([resolvable_margin(k, k, 500) for k in range(0, 200, 10)]) > 0).all()
    assert resolvable_margin(0, 0, 285) == pytest.approx(unchanged_width(285))
    assert 0.9 < resolvable_margin(1, 0, 1) <= 1
    with pytest.raises(InputError, match="above 0 and below 1"):
        resolvable_margin(1, 1, 10, power=1)


@pytest.mark.parametrize(
    ("worse", "better", "n", "margin"), [(62, 62, 718, 0.02), (13, 10, 200, 0.05), (0, 0, 50, 0.01)]
)
def test_the_samples_needed_are_the_fewest_that_do(worse: int, better: int, n: int, margin: float) -> None:
    needed = samples_needed(worse, better, n, margin)
    assert needed is not None

    def upper(pairs: int) -> float:
        return tango_interval(worse / n * pairs, better / n * pairs, pairs)[1]

    assert upper(needed) < margin <= upper(needed - 1)


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
    assert clustered == 718 * 16
    assert samples_needed(62, 62, 718, 0.02, upper=0.0201) == plain  # Tango's is what is missing then


def test_a_change_that_the_counts_could_not_show_is_borne() -> None:
    assert samples_needed(0, 0, 100, 0.05, change=0.02) is not None
