"""The exact bound keeps its level whatever the truth is, and agrees with Tango's where counts are many."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest, multinomial

from benchmarks.statistics.exact import clopper_pearson, exact_interval, exact_p, exact_upper, score
from benchmarks.statistics.tango import tango_interval, tango_z
from safevlm.errors import InputError


@pytest.mark.parametrize("n", [4, 11])
def test_the_bound_is_wrong_at_most_as_often_as_stated_whatever_the_truth(n: int) -> None:
    tables = [(up, down) for up in range(n + 1) for down in range(n + 1 - up)]
    uppers = np.array([exact_upper(up, down, n) for up, down in tables])
    counts = [(up, down, n - up - down) for up, down in tables]
    steps = np.linspace(0, 1, 26)
    for worse in steps:
        for better in steps[steps <= 1 - worse + 1e-12]:
            chances = multinomial.pmf(counts, n, (worse, better, max(0.0, 1 - worse - better)))
            assert chances[uppers < worse - better].sum() <= 0.05 + 1e-9, (worse, better)


@pytest.mark.parametrize(("worse", "better", "n"), [(0, 0, 40), (3, 1, 30), (1, 9, 60), (5, 0, 5), (40, 35, 800)])
def test_the_interval_holds_the_estimate_and_turns_with_the_direction(worse: int, better: int, n: int) -> None:
    low, high = exact_interval(worse, better, n)
    assert -1 <= low <= (worse - better) / n <= high <= 1
    assert exact_interval(better, worse, n) == (-high, -low)
    assert high >= exact_upper(worse, better, n) >= tango_interval(worse, better, n, confidence=0.9)[1] - 1e-4


def test_it_is_tango_s_where_counts_are_many() -> None:
    assert exact_interval(40, 35, 800) == pytest.approx(tango_interval(40, 35, 800), abs=5e-4)


@pytest.mark.parametrize(("n", "margin"), [(59, 0.05), (29, 0.1)])
def test_without_a_change_the_margin_is_proven_from_so_many_images_on(n: int, margin: float) -> None:
    assert (1 - margin) ** n <= 0.05 < (1 - margin) ** (n - 1)
    assert exact_p(0, 0, n, margin) <= 0.05 < exact_p(0, 0, n - 1, margin)
    assert exact_upper(0, 0, n) < margin < exact_upper(0, 0, n - 1)


def test_many_scores_at_once_are_tango_s_one_by_one() -> None:
    rng = np.random.default_rng(0)
    for n, difference in zip(rng.integers(1, 60, 40).tolist(), rng.uniform(-0.99, 0.99, 40).tolist(), strict=True):
        tables = [(up, down) for up in range(n + 1) for down in range(n + 1 - up)][:: max(1, n // 8)]
        found = score([up for up, _ in tables], [down for _, down in tables], n, difference)
        assert found == pytest.approx([tango_z(up, down, n, difference) for up, down in tables], abs=1e-9)


@pytest.mark.parametrize(("k", "n"), [(0, 7), (7, 7), (3, 50), (1, 1)])
def test_a_share_s_interval_is_scipy_s_exact_one(k: int, n: int) -> None:
    expected = binomtest(k, n).proportion_ci(0.95, method="exact")
    assert clopper_pearson(k, n) == pytest.approx((expected.low, expected.high))


def test_counts_that_are_none_are_refused() -> None:
    for call in (lambda: exact_upper(3, 3, 5), lambda: exact_p(-1, 0, 5, 0.1), lambda: clopper_pearson(2, 1)):
        with pytest.raises(InputError, match="needed"):
            call()
    with pytest.raises(InputError, match="level 0 is not allowed"):
        exact_upper(0, 0, 5, level=0)
    with pytest.raises(InputError, match="margin 2 is not allowed"):
        exact_p(0, 0, 5, 2)
