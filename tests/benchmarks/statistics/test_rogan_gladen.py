"""The correction undoes a judge's errors, and its interval covers the truth."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.statistics.rogan_gladen import rogan_gladen
from safevlm.errors import InputError


@pytest.mark.parametrize("truth", [0.1, 0.4, 0.75])
def test_a_judge_with_known_errors_is_undone(truth: float) -> None:
    n, se, sp = 10_000, 0.9, 0.8
    positives = round(n * (truth * se + (1 - truth) * (1 - sp)))
    found = rogan_gladen(positives, n, 900, 1000, 800, 1000)
    assert found.estimate == pytest.approx(truth)
    assert (found.sensitivity, found.specificity) == (0.9, 0.8)
    assert found.interval[0] < truth < found.interval[1]


def test_a_judge_without_errors_leaves_the_rate_and_about_its_own_interval() -> None:
    found = rogan_gladen(300, 1000, 10**6, 10**6, 10**6, 10**6)
    assert found.estimate == pytest.approx(0.3)
    assert found.interval == pytest.approx((0.2724, 0.3291), abs=2e-3)  # Wilson's, nearly


@pytest.mark.parametrize(
    ("truth", "n", "labelled", "se", "sp"),
    [(0.15, 700, 200, 0.9, 0.95), (0.45, 971, 100, 0.85, 0.9), (0.02, 682, 150, 0.8, 0.97), (0.5, 200, 40, 0.9, 0.9)],
)
def test_its_interval_covers_the_truth(truth: float, n: int, labelled: int, se: float, sp: float) -> None:
    rng = np.random.default_rng(1)
    covered = []
    for _ in range(1500):
        counts = rng.binomial(n, truth * se + (1 - truth) * (1 - sp)), rng.binomial(labelled, [se, sp])
        low, high = rogan_gladen(int(counts[0]), n, int(counts[1][0]), labelled, int(counts[1][1]), labelled).interval
        covered.append(low <= truth <= high)
    assert 0.93 < np.mean(covered) <= 1


def test_few_labels_widen_it_and_it_stays_within_0_and_1() -> None:
    widths = []
    for labelled in (10, 50, 250, 2500):
        low, high = rogan_gladen(100, 700, 9 * labelled // 10, labelled, 9 * labelled // 10, labelled).interval
        widths.append(high - low)
    assert (np.diff(widths) < 0).all()
    assert rogan_gladen(0, 50, 9, 10, 9, 10).estimate == 0
    assert rogan_gladen(50, 50, 9, 10, 9, 10).estimate == 1
    low, high = rogan_gladen(1, 3, 1, 1, 1, 2).interval
    assert 0 <= low < high <= 1


def test_more_confidence_is_wider() -> None:
    narrow = rogan_gladen(100, 700, 90, 100, 95, 100, confidence=0.8).interval
    wide = rogan_gladen(100, 700, 90, 100, 95, 100, confidence=0.99).interval
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_a_judge_no_better_than_chance_is_refused() -> None:
    with pytest.raises(InputError, match=r"5 of 10 positives and 5 of 10 negatives, no better than chance.*Label more"):
        rogan_gladen(3, 10, 5, 10, 5, 10)


@pytest.mark.parametrize("counts", [(4, 3, 1, 1, 1, 1), (1, 3, 2, 1, 1, 1), (1, 3, 0, 0, 1, 1), (0, 0, 1, 1, 1, 1)])
def test_impossible_counts_are_refused(counts: tuple[int, int, int, int, int, int]) -> None:
    with pytest.raises(InputError, match="at least one, and a count from 0 to their number"):
        rogan_gladen(*counts)
