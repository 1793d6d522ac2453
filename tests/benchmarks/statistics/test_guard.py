"""A guard's metrics against slow definitions, and the bootstrap of their differences against sklearn's in a loop."""

from __future__ import annotations

import math
import time

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.metrics import roc_auc_score

from benchmarks.statistics.guard import (
    BINS,
    guard_metrics,
    paired_bootstrap,
    reliability_points,
    roc_points,
)
from safevlm.errors import InputError

Floats = npt.NDArray[np.float64]
Whole = npt.NDArray[np.int64]


def guard(seed: int, n: int = 400, skill: float = 1.0) -> tuple[Floats, Whole]:
    """Return probabilities with ties, and labels."""
    rng = np.random.default_rng(seed)
    labels = np.where(rng.random(n) < 0.45, 0, rng.integers(1, 20, n))
    logits = rng.normal(0, 1, (n, 20))
    logits[np.arange(n), labels] += skill * 3
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    rounded = np.round(probs[:, 0], 2)
    probs[:, 1:] *= ((1 - rounded) / (1 - probs[:, 0]))[:, None]
    probs[:, 0] = rounded
    return np.clip(probs, 0, 1), labels


def slow_ece(score: Floats, unsafe: npt.NDArray[np.bool_]) -> float:
    total = 0.0
    for k in range(BINS):
        inside = (score >= k / BINS) & ((score < (k + 1) / BINS) | (k == BINS - 1))
        if inside.any():
            total += inside.sum() * abs(score[inside].mean() - unsafe[inside].mean())
    return total / len(score)


def test_metrics_are_their_definitions() -> None:
    probs, labels = guard(0)
    found = guard_metrics(probs, labels, 0.5)
    score, unsafe = 1 - probs[:, 0], labels > 0
    assert found.accuracy == np.mean(probs.argmax(axis=1) == labels)
    wins = (score[unsafe][:, None] > score[~unsafe]).mean() + 0.5 * (score[unsafe][:, None] == score[~unsafe]).mean()
    assert found.auroc == pytest.approx(wins)
    assert found.recall == np.mean(score[unsafe] >= 0.5)
    assert found.fpr == np.mean(score[~unsafe] >= 0.5)
    assert found.ece == pytest.approx(slow_ece(score, unsafe), abs=1e-9)


def test_an_image_at_the_threshold_is_blocked() -> None:
    probs = np.array([[0.5, 0.5], [0.75, 0.25]])
    assert guard_metrics(probs, [1, 0], 0.5).recall == 1
    assert guard_metrics(probs, [1, 0], 0.25).fpr == 1
    assert guard_metrics(probs, [1, 0], 0.26).fpr == 0


def test_images_of_one_kind_leave_undefined_what_is_undefined() -> None:
    probs, _ = guard(1, n=10)
    found = guard_metrics(probs, np.zeros(10, dtype=int), 0.5)
    assert math.isnan(found.auroc) and math.isnan(found.recall) and 0 <= found.fpr <= 1
    assert math.isnan(guard_metrics(probs, np.ones(10, dtype=int), 0.5).fpr)
    assert roc_points(probs, np.ones(10, dtype=int))[0].size == 0
    with pytest.raises(InputError, match="needs both safe and unsafe images"):
        paired_bootstrap("auroc", probs, probs, np.ones(10, dtype=int))
    assert paired_bootstrap("ece", probs, probs, np.ones(10, dtype=int)) == (0, 0)


def test_the_curves_are_consistent_with_the_metrics() -> None:
    probs, labels = guard(2)
    fpr, recall = roc_points(probs, labels)
    assert (fpr[0], recall[0], fpr[-1], recall[-1]) == (0, 0, 1, 1)
    assert (np.diff(fpr) >= 0).all() and (np.diff(recall) >= 0).all()
    area = float((np.diff(fpr) * (recall[1:] + recall[:-1]) / 2).sum())
    assert area == pytest.approx(guard_metrics(probs, labels, 0.5).auroc)
    told, true, counts = reliability_points(probs, labels)
    assert counts.sum() == len(labels)
    ece = float((counts * np.abs(told - true)).sum() / counts.sum())
    assert ece == pytest.approx(guard_metrics(probs, labels, 0.5).ece)
    assert len(reliability_points(probs, labels, bins=4)[0]) <= 4


@pytest.mark.parametrize("metric", ["auroc", "ece"])
def test_the_bootstrap_is_that_of_a_slow_loop(metric: str) -> None:
    (before, labels), (after, _) = guard(3), guard(3, skill=0.8)
    unsafe = labels > 0
    rng = np.random.default_rng(0)

    def value(probs: Floats, rows: Whole) -> float:
        score = 1 - probs[rows, 0]
        return float(roc_auc_score(unsafe[rows], score)) if metric == "auroc" else slow_ece(score, unsafe[rows])

    drawn = []
    for _ in range(1500):
        rows = rng.integers(0, len(labels), len(labels))
        drawn.append(value(after, rows) - value(before, rows))
    width = float(np.subtract(*np.percentile(drawn, [97.5, 2.5])))
    low, high = paired_bootstrap(metric, before, after, labels)
    assert (low, high) == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])), abs=width / 12)
    assert (low, high) == paired_bootstrap(metric, before, after, labels)
    assert (low, high) != paired_bootstrap(metric, before, after, labels, seed=1)
    assert paired_bootstrap(metric, after, before, labels) == pytest.approx((-high, -low))


def test_pairing_narrows_what_two_alike_guards_can_differ_by() -> None:
    probs, labels = guard(4)
    moved = np.clip(probs + np.random.default_rng(0).normal(0, 0.01, probs.shape), 0, 1)
    low, high = paired_bootstrap("auroc", probs, moved, labels)
    order = np.concatenate(
        [np.random.default_rng(1).permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)]
    )
    apart = np.empty_like(moved)
    apart[np.concatenate([np.flatnonzero(labels == c) for c in np.unique(labels)])] = moved[order]
    other = paired_bootstrap("auroc", probs, apart, labels)
    assert high - low < 0.7 * (other[1] - other[0])


def test_1791_images_take_less_than_2_seconds_each() -> None:
    (before, labels), (after, _) = guard(5, n=1791), guard(5, n=1791, skill=0.9)
    for metric in ("auroc", "ece"):
        began = time.process_time()
        paired_bootstrap(metric, before, after, labels)
        assert time.process_time() - began < 2


def test_what_does_not_fit_is_refused() -> None:
    probs, labels = guard(6, n=8)
    for wrong, truth, told in (
        (probs[:, :1], labels, "N x C"),
        (probs[:-1], labels, "N x C"),
        (probs[:0], labels[:0], "N at least 1"),
        (probs + 1, labels, "from 0 to 1"),
        (probs * np.nan, labels, "from 0 to 1"),
        (probs, labels + 20, "not one of the 20 classes 0 to 19"),
        (probs, labels - 20, "not one of the 20 classes"),
    ):
        with pytest.raises(InputError, match=told):
            guard_metrics(wrong, truth, 0.5)
    with pytest.raises(InputError, match=r"unknown\. Allowed: auroc, ece"):
        paired_bootstrap("f1", probs, probs, labels)
