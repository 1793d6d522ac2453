"""Tango's interval is the published one, solves its own equation, and keeps its level where counts are few."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import binom, norm

from benchmarks.statistics.tango import critical_value, tango_bound, tango_interval, tango_z
from safevlm.errors import InputError

PUBLISHED = [
    # worse, better, n, confidence, interval as printed; source
    (9, 3, 32, 0.95, (-0.027, 0.390), 3),  # Tango 1998, repeated measurements
    (0, 1, 44, 0.90, (-0.096, 0.037), 3),  # Tango 1998, contact lenses (after Miyanaga)
    (16, 8, 86, 0.95, (-0.020, 0.207), 3),  # Agresti and Min 2005
    (1, 7, 21, 0.95, (-0.517, -0.026), 3),  # Fagerland, Lydersen and Laake 2014, table V (Bentur et al.)
    (3, 1, 14, 0.95, (-0.1670, 0.4327), 4),  # Tang, Ling, Ling and Tian 2010
]
TABLES = [(0, 0, 5), (1, 0, 1), (0, 3, 3), (4, 0, 9), (2, 2, 4), (7, 1, 60), (12, 40, 300), (0, 2, 761), (61, 239, 971)]


@pytest.mark.parametrize(("worse", "better", "n", "confidence", "printed", "places"), PUBLISHED)
def test_published_intervals_are_met_to_the_last_printed_place(
    worse: int, better: int, n: int, confidence: float, printed: tuple[float, float], places: int
) -> None:
    found = tango_interval(worse, better, n, confidence=confidence)
    assert tuple(round(end, places) for end in found) == printed


def slow_z(worse: int, better: int, n: int, difference: float) -> float:
    """Return the score statistic, its nuisance parameter found by searching the likelihood."""
    low, high = max(0.0, -difference), min(1.0, (1 - difference) / 2 + max(0.0, -difference))

    def minus_log_likelihood(share: float) -> float:
        cells = ((worse, share + difference), (better, share), (n - worse - better, 1 - 2 * share - difference))
        return -sum(count * math.log(max(p, 1e-300)) for count, p in cells if count)

    grid = np.linspace(low, high, 2001)
    best = int(np.argmin([minus_log_likelihood(share) for share in grid]))
    found = minimize_scalar(
        minus_log_likelihood,
        bounds=(grid[max(best - 1, 0)], grid[min(best + 1, 2000)]),
        method="bounded",
        options={"xatol": 1e-13},
    )
    share = min((float(found.x), low, high), key=minus_log_likelihood)
    return (worse - better - n * difference) / math.sqrt(n * (2 * share + difference * (1 - difference)))


@pytest.mark.parametrize(("worse", "better", "n"), [(9, 3, 32), (1, 7, 21), (7, 1, 60), (4, 0, 9), (61, 239, 971)])
def test_the_statistic_is_the_one_of_a_likelihood_that_was_searched(worse: int, better: int, n: int) -> None:
    low, high = tango_interval(worse, better, n)
    z = critical_value(0.95)
    assert slow_z(worse, better, n, low) == pytest.approx(z, abs=2e-4)
    assert slow_z(worse, better, n, high) == pytest.approx(-z, abs=2e-4)
    for difference in (-0.4, -0.05, 0.03, 0.2, 0.7):
        assert tango_z(worse, better, n, difference) == pytest.approx(slow_z(worse, better, n, difference), rel=1e-4)


@pytest.mark.parametrize(("worse", "better", "n"), TABLES)
def test_it_is_mirrored_holds_the_estimate_and_stays_within_its_bounds(worse: int, better: int, n: int) -> None:
    low, high = tango_interval(worse, better, n)
    assert (-high, -low) == pytest.approx(tango_interval(better, worse, n), abs=1e-12)
    assert -1 <= low <= (worse - better) / n <= high <= 1
    wide = tango_interval(worse, better, n, confidence=0.99)
    assert wide[0] <= low and high <= wide[1]


@pytest.mark.parametrize("n", [1, 2, 17, 400, 10**6])
def test_edges_have_closed_forms(n: int) -> None:
    z2 = critical_value(0.95) ** 2
    assert tango_interval(0, 0, n) == pytest.approx((-z2 / (n + z2), z2 / (n + z2)), abs=1e-11)
    low, high = tango_interval(n, 0, n)
    assert high == 1
    assert low == pytest.approx(1 - 2 * z2 / (n + z2), abs=1e-11)


def test_more_harm_moves_both_ends_up() -> None:
    ends = np.array([tango_interval(worse, 10, 200) for worse in range(191)])
    assert (np.diff(ends, axis=0) > 0).all()
    shrinking = [tango_interval(2 * k, k, 100 * k) for k in range(1, 40)]
    assert (np.diff([high - low for low, high in shrinking]) < 0).all()


@pytest.mark.parametrize(("worse", "better", "n"), TABLES)
def test_the_test_rejects_a_margin_exactly_where_the_interval_ends_below_it(worse: int, better: int, n: int) -> None:
    high = tango_interval(worse, better, n)[1]
    for margin in np.linspace(-0.999, 0.999, 41):
        p = norm.cdf(tango_z(worse, better, n, float(margin)))
        assert 0 <= p <= 1
        if abs(margin - high) > 1e-9:
            assert (p < 0.025) == (high < margin)


def false_pass(n: int, margin: float, down: float, confidence: float) -> float:
    """Return, over all tables, how often the bound lies below the true difference; ``down`` became better."""
    up, found = down + margin, 0.0
    most = int(n * up + 8 * math.sqrt(n * up) + 8)
    for better in range(min(n, int(n * down + 8 * math.sqrt(n * down)) + 8) + 1):
        some = binom.pmf(better, n, down)
        if some < 1e-12:
            continue
        for worse in range(min(most, n - better) + 1):
            if tango_bound(worse, better, n, confidence=confidence) >= margin:
                break
            found += some * binom.pmf(worse, n - better, up / (1 - down))
    return found


@pytest.mark.parametrize(("n", "margin"), [(60, 0.1), (155, 0.03), (270, 0.01), (682, 0.03), (957, 0.015)])
@pytest.mark.parametrize("confidence", [0.8, 0.9, 0.95, 0.975])
def test_a_truth_at_the_margin_is_passed_at_most_so_often_over_all_tables(
    n: int, margin: float, confidence: float
) -> None:
    rates = [false_pass(n, margin, down, confidence) for down in (0.0, 0.001, 0.005, 0.02)]
    assert max(rates) <= 1 - confidence  # the plain score bound errs in up to 6.6 % instead of 5
    assert max(rates) > 0.4 * (1 - confidence)  # and the level is not kept by never passing


@pytest.mark.parametrize("n", [40, 285, 957])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_without_a_change_the_bound_is_hardly_above_the_exact_binomial_one(n: int, confidence: float) -> None:
    exact = 1 - (1 - confidence) ** (1 / n)
    assert exact < tango_bound(0, 0, n, confidence=confidence) < exact + 0.25 / n


def test_the_bound_is_above_the_score_interval_of_its_level_by_less_than_a_sample() -> None:
    for worse, better, n in TABLES:
        plain = tango_interval(worse, better, n, confidence=0.9)[1]
        assert plain <= tango_bound(worse, better, n) <= tango_interval(min(worse + 1, n - better), better, n)[1]


@pytest.mark.parametrize(("worse", "better", "n"), [(-1, 0, 3), (2, 2, 3), (0, 0, 0), (math.nan, 0, 3)])
def test_counts_that_cannot_be_are_refused(worse: float, better: float, n: int) -> None:
    with pytest.raises(InputError, match="of at least 0 are needed, together at most the number of pairs"):
        tango_interval(worse, better, n)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0])
def test_a_confidence_outside_0_to_1_is_refused(confidence: float) -> None:
    with pytest.raises(InputError, match=r"Give a number above 0 and below 1, such as 0\.95"):
        tango_interval(1, 2, 30, confidence=confidence)


def test_it_covers_every_truth_about_as_often_as_it_says() -> None:
    n = 25
    tables = list(itertools.product(range(n + 1), range(n + 1)))
    for up, down in ((0.1, 0.1), (0.3, 0.1), (0.05, 0.0), (0.5, 0.4)):
        covered = 0.0
        for worse, better in tables:
            if worse + better <= n:
                low, high = tango_interval(worse, better, n)
                chance = binom.pmf(worse, n, up) * binom.pmf(better, n - worse, down / (1 - up))
                covered += chance * (low <= up - down <= high)
        assert 0.92 < covered <= 1
