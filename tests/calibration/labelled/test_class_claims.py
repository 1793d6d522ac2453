"""Classes that labelled images cannot certify, and how many images each would take."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError
from scipy.stats import binom

from calibration.labelled.class_claims import DRIFT, DROP, images_for, uncertified_classes
from calibration.labelled.risk_control import Method, Promise, fewest, hits_allowed
from safevlm.contract.class_claims import Uncertified

CLASSES = ("safe", "many", "few", "bad", "none")
TRUTH = np.repeat([0, 1, 2, 3], [50, 200, 10, 200])
METHODS: tuple[Method, ...] = ("conformal_risk_control", "learn_then_test")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("alpha", [0.02, 0.05, 0.2])
def test_images_for_is_the_first_number_that_allows_so_many_wrong(method: Method, alpha: float) -> None:
    promise = Promise(alpha=alpha, method=method)
    for wrong in (0, 1, 5):
        n = images_for(wrong, promise)
        assert hits_allowed(n, alpha, promise) >= wrong > hits_allowed(n - 1, alpha, promise)
    assert images_for(0, promise) == fewest(alpha, promise)


def test_classes_that_carry_neither_claim_say_what_they_lack() -> None:
    missed = (TRUTH == 3) & (np.arange(len(TRUTH)) % 4 == 0)  # a quarter of one class
    promise = Promise(alpha=0.05)
    found = uncertified_classes(TRUTH, CLASSES, promise=promise, missed=missed, newly=missed)
    assert set(found) == {"few", "bad", "none"}, "safe is no harm, and many images carry both"
    assert found["few"] == Uncertified(n=10, missed=0, promise_needs=19, newly_missed=0, drift_needs=29)
    assert found["none"].n == 0 and found["none"].promise_needs == 19
    assert found["bad"].missed == found["bad"].newly_missed == 50
    assert found["bad"].promise_needs == images_for(50, promise)


def test_a_claim_that_is_not_looked_at_is_not_stated() -> None:
    found = uncertified_classes(TRUTH, CLASSES, newly=np.zeros(len(TRUTH), bool))
    assert found["few"] == Uncertified(n=10, newly_missed=0, drift_needs=29)
    missed = np.zeros(len(TRUTH), bool)
    promise_alone = uncertified_classes(TRUTH, CLASSES, promise=Promise(), missed=missed)
    assert promise_alone["few"].drift_needs is None and promise_alone["few"].newly_missed is None


@pytest.mark.parametrize("n", [29, 46, 100, 300])
def test_a_class_at_the_margin_is_certified_at_most_five_times_in_a_hundred(n: int) -> None:
    truth = np.ones(n, np.int64)
    certified = [
        wrong
        for wrong in range(n // 5)
        if "many" not in uncertified_classes(truth, CLASSES, newly=np.arange(n) < wrong)
    ]
    assert certified and binom.cdf(max(certified), n, DROP) <= DRIFT.delta


def test_a_statement_that_cannot_be_is_refused() -> None:
    for wrong in ({"n": 3, "missed": 4, "promise_needs": 9}, {"n": 3, "missed": 0}):
        with pytest.raises(ValidationError):
            Uncertified.model_validate(wrong)
