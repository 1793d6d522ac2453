"""Verdicts follow p(unsafe), at the stated limits and on both sides of them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from runtimes.guard.verdict import decide
from safevlm.contract.class_names import safe_index
from safevlm.contract.manifest import Band, GuardFile
from safevlm.errors import SafeVLMError
from tests.runtimes.bundles import CLASSES, fitted


def listed_file() -> GuardFile:
    return GuardFile(path="guard.fp32.onnx", sha256="a" * 64, bytes=1, kind="onnx", precision="fp32")


def row(*values: float) -> npt.NDArray[np.float32]:
    return np.array(values, np.float32)


@pytest.mark.parametrize(
    ("safe", "verdict"), [(1.0, "allow"), (0.51, "allow"), (0.5, "block"), (0.49, "block"), (0.0, "block")]
)
def test_unfitted_guards_block_from_one_half_up(safe: float, verdict: str) -> None:
    decision = decide(row(safe, 1 - safe, 0), CLASSES)
    assert decision.verdict == verdict and decision.p_unsafe == pytest.approx(1 - safe, abs=1e-6)


@pytest.mark.parametrize(
    ("safe", "verdict"), [(0.9, "allow"), (0.75, "unsure"), (0.5, "unsure"), (0.25, "block"), (0.1, "block")]
)
def test_fitted_thresholds_leave_a_band_unsure(safe: float, verdict: str) -> None:
    thresholds = fitted(listed_file(), block=0.75, allow=0.25)
    assert decide(row(safe, 1 - safe, 0), CLASSES, thresholds).verdict == verdict


@pytest.mark.parametrize(("p", "verdict"), [(0.31, "block"), (0.29, "allow")])
def test_a_class_can_have_a_band_of_its_own(p: float, verdict: str) -> None:
    drug = Band(block=0.3, allow=0.3, n_unsafe=50)
    thresholds = fitted(listed_file(), block=0.9, allow=0.5, per_class={"drug": drug})
    assert decide(row(1 - p, 0, p), CLASSES, thresholds).verdict == verdict
    assert decide(row(1 - p, p, 0), CLASSES, thresholds).verdict == "allow"


def test_the_label_is_the_most_probable_class_and_the_safe_one_is_found_by_name() -> None:
    assert decide(row(0.4, 0.35, 0.25), CLASSES).label == "safe"
    assert decide(row(0.1, 0.2, 0.7), CLASSES).label == "drug"
    assert safe_index(("weapon", "safe")) == 1 and safe_index(("benign", "weapon")) == 0
    assert decide(row(0.9, 0.1), ("weapon", "safe")).verdict == "block"


def test_rounding_never_leaves_the_range_of_probabilities() -> None:
    assert decide(row(1.0000001, 0, 0), CLASSES).p_unsafe == 0.0


def test_a_row_of_another_width_is_refused() -> None:
    with pytest.raises(SafeVLMError, match="one row of 3 probabilities"):
        decide(row(1, 0), CLASSES)
