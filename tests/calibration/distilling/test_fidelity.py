"""Fidelity's figures equal slow, obvious computations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from statsmodels.stats.proportion import proportion_confint

from calibration.distilling.fidelity import auroc, bootstrap, fidelity, mean_kl, recall_at_fpr, wilson

SCORES = st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=40)


def split(rows: list[tuple[int, bool]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([score for score, _ in rows]) / 6, np.array([flag for _, flag in rows])


@given(SCORES)
def test_auroc_counts_pairs(rows: list[tuple[int, bool]]) -> None:
    scores, positive = split(rows)
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[positive] for n in scores[~positive]]
    found = auroc(scores, positive)
    assert found is None if not pairs else found == pytest.approx(np.mean(pairs))
    assert not pairs or found == pytest.approx(roc_auc_score(positive, scores))


@given(SCORES, st.sampled_from([0.01, 0.05, 0.2, 0.5]))
def test_recall_is_of_the_lowest_threshold_that_keeps_the_rate(rows: list[tuple[int, bool]], rate: float) -> None:
    scores, positive = split(rows)
    found = recall_at_fpr(scores, positive, rate)
    if positive.all() or not positive.any():
        assert found is None
        return
    recalls = [
        np.mean(scores[positive] > bound)
        for bound in (-1.0, *scores)
        if np.sum(scores[~positive] > bound) <= rate * np.sum(~positive) + 1e-9
    ]
    assert found == pytest.approx(max(recalls))


def test_kl_is_in_nats_and_zero_for_equals() -> None:
    p, q = np.array([[0.5, 0.5], [1.0, 0.0]]), np.array([[0.25, 0.75], [0.5, 0.5]])
    by_hand = (0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75) + math.log(2)) / 2
    assert mean_kl(p, q) == pytest.approx(by_hand)
    assert mean_kl(p, p) == 0


def test_wilson_is_the_root_of_its_definition() -> None:
    for hits, n in ((1, 10), (9, 10), (40, 80)):
        found = wilson(hits, n)
        for bound in (found["low"], found["high"]):
            assert bound is not None  # |share - bound| = z * sqrt(bound (1 - bound) / n)
            assert abs(hits / n - bound) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / n), rel=1e-5)
        reference = proportion_confint(hits, n, method="wilson")
        assert (found["low"], found["high"]) == pytest.approx(reference, abs=1e-9)
    assert wilson(0, 10)["low"] == 0 and wilson(10, 10)["high"] == 1
    assert wilson(0, 0) == {"value": None, "low": None, "high": None}


def test_bootstrap_covers_what_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for number in range(200):
        sample = rng.normal(size=60)
        found = bootstrap(lambda rows, sample=sample: float(sample[rows].mean()), 60, seed=number)
        assert found["low"] is not None and found["high"] is not None
        covered += found["low"] <= 0 <= found["high"]
    assert 0.88 <= covered / 200 <= 0.99
    assert bootstrap(lambda _: None, 5)["value"] is None


def test_a_report_against_teacher_and_labels() -> None:
    rng = np.random.default_rng(3)
    teacher, student = (rng.dirichlet(np.ones(3) / 2, size=300) for _ in range(2))
    student = 0.8 * teacher + 0.2 * student
    labels = np.where(rng.random(300) < 0.5, teacher.argmax(1), -1)
    found = fidelity(teacher, student, ("fire", "safe", "flood"), safe=1, labels=labels, seed=1)
    same = student.argmax(1) == teacher.argmax(1)
    assert found["agreement"]["value"] == pytest.approx(same.mean()) and found["n"] == 300
    assert found["auroc"]["value"] == auroc(1 - student[:, 1], 1 - teacher[:, 1] >= 0.5)
    assert found["auroc"]["low"] < found["auroc"]["value"] < found["auroc"]["high"]
    assert sum(row["n"] for row in found["per_class"].values()) == 300
    fire = teacher.argmax(1) == 0
    assert found["per_class"]["fire"]["agreement"]["value"] == pytest.approx(same[fire].mean())
    known = labels >= 0
    assert found["labels"]["n"] == known.sum() and found["labels"]["teacher_accuracy"]["value"] == 1
    assert found["labels"]["accuracy"]["value"] == pytest.approx(same[known].mean())
    assert found == fidelity(teacher, student, ("fire", "safe", "flood"), safe=1, labels=labels, seed=1)


def test_a_missing_side_is_null() -> None:
    teacher = np.tile([0.9, 0.1], (20, 1))
    found = fidelity(teacher, teacher, ("safe", "fire"))
    assert found["auroc"]["value"] is None and found["recall_at_1_fpr"]["value"] is None
    assert found["per_class"]["fire"]["agreement"]["value"] is None and found["agreement"]["value"] == 1
