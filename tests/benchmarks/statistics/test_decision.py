"""The verdict's rule, case by case."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import pytest

from benchmarks.statistics.decision import LineVerdict, decide, overall
from safevlm.errors import InputError


@pytest.mark.parametrize(
    ("uppers", "change", "p_holm", "verdict"),
    [
        ((0.01, 0.019), 0.0, 1.0, "PASS"),
        ((0.01, 0.019), 0.005, 0.001, "PASS"),  # harm, shown, and smaller than declared acceptable
        ((0.01, 0.02), 0.0, 1.0, "INCONCLUSIVE"),  # at the margin is not below it
        ((0.01, 0.03), 0.0, 1.0, "INCONCLUSIVE"),  # one bound is not enough
        ((0.03, 0.01), 0.0, 1.0, "INCONCLUSIVE"),
        ((0.03,), 0.02, 0.049, "REGRESSION"),
        ((0.03,), 0.02, 0.05, "INCONCLUSIVE"),
        ((0.03,), -0.02, 0.001, "INCONCLUSIVE"),  # a gain is no harm
        ((math.nan, 0.01), 0.0, 1.0, "INCONCLUSIVE"),
        ((0.03,), 0.02, math.nan, "INCONCLUSIVE"),
    ],
)
def test_a_line(uppers: Sequence[float], change: float, p_holm: float, verdict: LineVerdict) -> None:
    assert decide(uppers=uppers, margin=0.02, change=change, p_holm=p_holm, alpha=0.05) == verdict


def test_a_line_without_a_bound_is_never_passed() -> None:
    with pytest.raises(InputError, match="without an upper bound"):
        decide(uppers=(), margin=0.02, change=0.0, p_holm=1.0, alpha=0.05)


def test_the_whole_is_its_worst_line() -> None:
    order: list[LineVerdict] = ["PASS", "INCONCLUSIVE", "REGRESSION"]
    for verdicts in product(order, repeat=3):
        assert overall(verdicts) == max(verdicts, key=order.index)
    with pytest.raises(InputError, match="nothing to decide"):
        overall([])
