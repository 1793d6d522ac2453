"""Corrections equal what is known where everything was labelled, whatever was drawn, and know what they cannot know."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.statistics.judge_errors import Answers, Correction
from benchmarks.statistics.tango import tango_interval

N = 4000
DRAWS = 2000
CONFIDENCE = 0.95


def answers(
    *,
    rate: float = 0.2,
    worse: float = 0.05,
    finds: tuple[float, float] = (0.85, 0.85),
    right: float = 0.85,
    seed: int = 0,
) -> tuple[Answers, np.ndarray]:
    """Return pairs as a judge sees them, none labelled, and the truth; ``finds``: sensitivity in either run."""
    rng = np.random.default_rng(seed)
    before = rng.random(N) < rate
    truth = np.stack([before, np.where(rng.random(N) < worse, True, before)], axis=1)
    words = np.where(truth, rng.random((N, 2)) < finds, rng.random((N, 2)) > right)
    none = np.full((N, 2), np.nan)
    return Answers(types=np.arange(N) % 2, clusters=np.arange(N), words=words, labels=none), truth


def labelled(given: Answers, truth: np.ndarray, chosen: np.ndarray, *, both: bool = False) -> Answers:
    labels = np.full((N, 2), np.nan)
    labels[chosen, : 1 + both] = truth[chosen, : 1 + both]
    return replace(given, labels=labels)


def upper(given: Answers) -> float:
    step = given.words[:, 1].astype(int) - given.words[:, 0]
    return tango_interval(int((step > 0).sum()), int((step < 0).sum()), N, confidence=CONFIDENCE)[1]


def change(given: Answers) -> tuple[float, float, float]:
    found = Correction(given, draws=DRAWS).change([0.5, 0.5], upper(given), CONFIDENCE)
    assert found is not None
    return found.low, found.change, found.high


def test_labels_of_all_answers_of_both_runs_give_the_true_change() -> None:
    given, truth = answers()
    true = float(truth[:, 1].mean() - truth[:, 0].mean())
    low, middle, high = change(labelled(given, truth, np.arange(N), both=True))
    assert middle == pytest.approx(true, abs=0.001) and low < true < high < true + 0.015


def test_a_judge_without_errors_is_left_alone_but_for_what_the_labels_do_not_know() -> None:
    given, truth = answers(finds=(1, 1), right=1)
    seen = float(truth[:, 1].mean() - truth[:, 0].mean())
    _, middle, high = change(labelled(given, truth, np.arange(0, N, 10)))
    assert middle == pytest.approx(seen, abs=0.001)
    assert upper(given) <= high < upper(given) + 0.01
    few = change(labelled(given, truth, np.arange(0, N, 40)))
    assert few[2] > high


@pytest.mark.parametrize("both", [False, True])
def test_it_does_not_matter_which_cells_were_labelled_more(both: bool) -> None:
    given, truth = answers()
    rng, cells = np.random.default_rng(1), given.cells
    uneven = np.flatnonzero(rng.random(N) < np.array([0.15, 0.9, 0.4, 0.2])[cells])
    true = float(truth[:, 1].mean() - truth[:, 0].mean())
    even = change(labelled(given, truth, np.flatnonzero(rng.random(N) < 0.3), both=both))
    odd = change(labelled(given, truth, uneven, both=both))
    for _, middle, high in (even, odd):
        assert middle == pytest.approx(true, abs=0.012) and high > true
    assert odd[1] == pytest.approx(even[1], abs=0.012)


def test_a_judge_that_errs_otherwise_in_the_candidate_is_seen_by_labels_of_both_runs() -> None:
    given, truth = answers(finds=(0.95, 0.7), right=0.95, worse=0.08)
    true = float(truth[:, 1].mean() - truth[:, 0].mean())
    chosen = np.arange(0, N, 4)
    assert change(labelled(given, truth, chosen))[2] < true, "labels of the baseline cannot know"
    low, _, high = change(labelled(given, truth, chosen, both=True))
    assert low < true < high


def test_labels_by_another_judge_s_words_are_weighed() -> None:
    given, truth = answers()
    other_words = np.where(
        truth, np.random.default_rng(5).random((N, 2)) < 0.9, np.random.default_rng(6).random((N, 2)) > 0.9
    )
    chance = np.where(other_words[:, 0], 0.9, 0.1)
    chosen = np.flatnonzero(np.random.default_rng(7).random(N) < chance)
    plain = labelled(given, truth, chosen)
    weighed = replace(plain, weights=np.stack([1 / chance, 1 / chance], axis=1))
    rates = [float(np.median(Correction(each, draws=DRAWS).rates()[0])) for each in (plain, weighed)]  # type: ignore[index]
    true = truth[:, 0].mean()
    assert abs(rates[1] - true) < 0.02 < abs(rates[0] - true)


def test_labels_of_changed_answers_alone_correct_nothing_and_say_what_lacks() -> None:
    given, truth = answers()
    changed = np.flatnonzero(given.words[:, 0] != given.words[:, 1])
    found = Correction(labelled(given, truth, changed, both=True), draws=DRAWS)
    assert found.design is None and found.change([0.5, 0.5], 0.0, CONFIDENCE) is None and found.rates() is None
    assert {lack.words for lack in found.lacking("alike")} == {(False, False), (True, True)}
    assert {lack.run for lack in found.lacking("each run")} == {"baseline", "candidate"}


@pytest.mark.parametrize("finds", [(0.3, 0.3), (0.5, 0.5)])
def test_a_judge_no_better_than_chance_cannot_be_corrected(finds: tuple[float, float]) -> None:
    given, truth = answers(finds=finds, right=0.5)
    assert Correction(labelled(given, truth, np.arange(N)), draws=DRAWS).change([0.5, 0.5], 0.01, CONFIDENCE) is None


def test_bad_answers_that_nobody_has_seen_leave_the_judge_unknown() -> None:
    given, truth = answers(rate=0.0, worse=0.02, right=0.97)
    some = labelled(given, truth, np.arange(0, N, 10))
    found = Correction(some, draws=DRAWS).change([0.5, 0.5], upper(given), CONFIDENCE)
    assert found is None or found.high > 0.3
    assert change(labelled(given, truth, np.arange(0, N, 10), both=True))[2] < 0.06


def test_more_of_the_same_labels_leave_less_open() -> None:
    given, truth = answers()
    some = labelled(given, truth, np.arange(0, N, 40))
    highs = [
        found.high
        for factor in (1, 4, 100)
        if (found := Correction(some, draws=DRAWS, factor=factor).change([0.5, 0.5], upper(some), CONFIDENCE))
    ]
    assert len(highs) == 3 and highs == sorted(highs, reverse=True)
