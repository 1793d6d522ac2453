"""Among many classes harm is told at the stated level, and the planned number of images gives the stated power."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import multinomial

from benchmarks.statistics.classes import images_needed, images_to_settle, mcnemar_family, worse_p
from benchmarks.statistics.exact import exact_p
from benchmarks.statistics.holm import holm
from benchmarks.statistics.mcnemar import mcnemar_exact
from safevlm.errors import InputError


def test_where_every_class_could_be_told_it_is_holm_s() -> None:
    changed = [(12, 0), (9, 4), (2, 11), (10, 10)]
    assert mcnemar_family(changed, 0.05) == holm([mcnemar_exact(*each) for each in changed])


def test_classes_in_which_too_few_images_changed_cost_nothing() -> None:
    found = mcnemar_family([(7, 0), *[(1, 1)] * 18, *[(0, 0)] * 19], 0.05)
    assert found[0] == mcnemar_exact(7, 0) and set(found[1:]) == {1.0}
    assert mcnemar_family([], 0.05) == []


@pytest.mark.parametrize("mean", [2.0, 8.0, 20.0])
def test_unchanged_classes_are_told_at_most_as_often_as_stated(mean: float) -> None:
    rng = np.random.default_rng(0)
    totals = rng.poisson(mean, (1500, 19))
    worse = rng.binomial(totals, 0.5)
    told = sum(
        min(mcnemar_family(list(zip(up.tolist(), down.tolist(), strict=True)), 0.05)) < 0.05
        for up, down in zip(worse, totals - worse, strict=True)
    )
    assert told / 1500 <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 1500)


def power(n: int, churn: float, margin: float) -> float:
    """Return the chance that n images of an unchanged class prove the margin, table by table."""
    most = min(n, 14)
    tables = [(up, down, n - up - down) for up in range(most) for down in range(most) if up + down <= n]
    chances = multinomial.pmf(tables, n, (churn / 2, churn / 2, 1 - churn))
    proven = [exact_p(up, down, n, margin) <= 0.05 for up, down, _ in tables]
    return float(chances[proven].sum())


@pytest.mark.parametrize(("churn", "margin"), [(0.012, 0.05), (0.03, 0.1)])
def test_the_planned_images_give_the_power_and_much_fewer_do_not(churn: float, margin: float) -> None:
    n = images_needed(churn, margin)
    assert n is not None
    assert power(n, churn, margin) >= 0.8 > power(3 * n // 4, churn, margin)


def test_without_churn_the_plan_is_what_no_change_at_all_would_prove() -> None:
    assert (images_needed(0.0, 0.05), images_needed(0.0, 0.1)) == (59, 29)
    assert images_needed(1.0, 0.001) is None
    with pytest.raises(InputError, match="are shares"):
        images_needed(0.1, 1.0)


def test_images_to_settle_are_the_first_that_prove_the_rates_seen() -> None:
    n = images_to_settle(2, 1, 80, 0.05)
    assert n is not None and n > 80
    assert exact_p(round(2 * n / 80 + 0.49), n // 80, n, 0.05) <= 0.05
    assert images_to_settle(5, 0, 80, 0.05) is None, "the worsening seen reaches the margin"


def test_the_one_sided_p_counts_heads() -> None:
    assert worse_p(5, 0) == pytest.approx(1 / 32)
    assert worse_p(1, 1) == pytest.approx(3 / 4) and worse_p(0, 0) == 1.0
