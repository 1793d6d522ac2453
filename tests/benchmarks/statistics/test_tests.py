"""McNemar's and Holm's tests, and the interval of a share, against slow or other people's code."""

from __future__ import annotations

import math

import numpy as np
import pytest
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from benchmarks.statistics.holm import holm
from benchmarks.statistics.mcnemar import mcnemar_exact
from benchmarks.statistics.proportions import wilson_interval
from safevlm.errors import InputError


@pytest.mark.parametrize(("worse", "better"), [(0, 0), (1, 0), (0, 5), (5, 5), (6, 5), (13, 2), (62, 42), (61, 239)])
def test_mcnemar_is_exact_and_two_sided(worse: int, better: int) -> None:
    n, few = worse + better, min(worse, better)
    tail = sum(math.comb(n, k) for k in range(few + 1)) / 2**n
    assert mcnemar_exact(worse, better) == pytest.approx(min(1.0, 2 * tail))
    if n:
        table = np.array([[0, worse], [better, 0]])
        assert mcnemar_exact(worse, better) == pytest.approx(mcnemar(table, exact=True).pvalue)
    assert mcnemar_exact(worse, better) == mcnemar_exact(better, worse)


def test_a_count_below_0_is_refused() -> None:
    with pytest.raises(InputError, match="counts must be at least 0"):
        mcnemar_exact(-1, 3)


@pytest.mark.parametrize("seed", range(5))
def test_holm_is_statsmodels_holm(seed: int) -> None:
    rng = np.random.default_rng(seed)
    p = np.round(rng.random(9) ** 3, 2)  # with ties and zeros
    assert holm(p.tolist()) == pytest.approx(multipletests(p, method="holm")[1].tolist())


def test_holm_keeps_order_never_lowers_and_bears_none() -> None:
    assert holm([]) == []
    assert holm([0.04]) == [0.04]
    assert holm([0.01, 0.9, 0.02]) == pytest.approx([0.03, 0.9, 0.04])
    assert holm([0.5, 0.5, 0.5]) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("wrong", [-0.1, 1.1, math.nan])
def test_holm_refuses_what_is_no_p(wrong: float) -> None:
    with pytest.raises(InputError, match="must lie between 0 and 1"):
        holm([0.5, wrong])


def test_wilson_is_his_formula_and_stays_within_0_and_1() -> None:
    z = 1.959963984540054
    for k, n in ((0, 1), (1, 1), (0, 10), (15, 148), (81, 263), (761, 761)):
        p = k / n
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        low, high = wilson_interval(k, n)
        assert (low, high) == pytest.approx((middle - half, middle + half), abs=1e-12)
        assert 0 <= low <= p <= high <= 1
    assert [round(end, 4) for end in wilson_interval(81, 263)] == [0.2553, 0.3662]  # Newcombe 1998, table I


@pytest.mark.parametrize(("k", "n"), [(0, 0), (-1, 3), (4, 3)])
def test_an_impossible_count_is_refused(k: int, n: int) -> None:
    with pytest.raises(InputError, match="a count from 0 to the number of samples"):
        wilson_interval(k, n)
