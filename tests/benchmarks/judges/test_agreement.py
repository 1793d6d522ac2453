"""Agreement equals counts made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.judges.agreement import Agreement, agreement
from safevlm.errors import InputError


def test_kappa_is_agreement_beyond_chance() -> None:
    # Cohen's table: 20 both yes, 15 both no, 5 and 10 apart: p_o 0.7, p_e 0.5
    first = [True] * 25 + [False] * 25
    other = [True] * 20 + [False] * 5 + [True] * 10 + [False] * 15
    assert agreement(first, other) == Agreement(kappa=pytest.approx(0.4), agreement=0.7, n=50)


def test_kappa_equals_its_definition_on_random_scores() -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        first, other = rng.random(60) < 0.7, rng.random(60) < 0.4
        observed, one, two = (first == other).mean(), first.mean(), other.mean()
        chance = one * two + (1 - one) * (1 - two)
        found = agreement(first.tolist(), other.tolist())
        assert found.kappa == pytest.approx((observed - chance) / (1 - chance))
        assert found.agreement == pytest.approx(observed)


def test_only_rows_that_both_scored_count() -> None:
    found = agreement([True, None, False, True], [True, True, False, None])
    assert (found.n, found.agreement, found.kappa) == (2, 1.0, pytest.approx(1.0))


@pytest.mark.parametrize("scores", [[], [None], [True] * 5, [False] * 5])
def test_kappa_is_undefined_where_judges_cannot_disagree_by_chance(scores: list[bool | None]) -> None:
    found = agreement(scores, scores)
    assert found.kappa is None
    assert found.agreement == (1.0 if any(score is not None for score in scores) else None)


def test_constant_and_opposite_judges_have_kappa_0() -> None:
    assert agreement([True] * 4, [False] * 4) == Agreement(kappa=pytest.approx(0.0), agreement=0.0, n=4)


def test_scores_of_different_rows_are_refused() -> None:
    with pytest.raises(InputError, match="3 and 2 rows"):
        agreement([True] * 3, [True] * 2)
