"""Compare an exported file with the torch path that it was made from: the last step of every export.

Shapes: n images, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from safevlm.contract.manifest import Parity
from safevlm.errors import ParityError

__all__ = ["TOLERANCES", "Tolerance", "check_embeddings", "check_parity"]

Floats = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """The largest change of a probability that a precision may cause, and whether a label may change by it.

    Where no probability moves by more than ``probability``, a label can only change between two classes that
    the reference itself holds less than twice that apart.
    """

    probability: float
    labels_may_change: bool
    embedding: float
    """Largest change of an image embedding, relative to the largest value among them."""


TOLERANCES: Mapping[str, Tolerance] = {
    "fp32": Tolerance(probability=1e-5, labels_may_change=False, embedding=1e-4),
    "fp16": Tolerance(probability=2e-2, labels_may_change=True, embedding=2e-2),
}


def check_parity(
    reference_nC: Floats,
    found_nC: Floats,
    tolerance: Tolerance,
    *,
    what: str,
    reference: str,
    advice: str = "Please report this with the checkpoint's name.",
) -> Parity:
    """Return the agreement of two sets of probabilities for the same n images.

    ``what`` and ``reference`` name the two in messages and in the manifest.

    Raises ParityError, ending in ``advice``, when a value is not finite or the tolerance is exceeded.
    """
    images = len(reference_nC)
    if not np.isfinite(found_nC).all():
        wrong = int((~np.isfinite(found_nC)).sum())
        raise ParityError(f"{what}: {wrong} probabilities of {images} images are not finite. {advice}")
    worst = float(np.abs(found_nC.astype(np.float64) - reference_nC).max())
    flips = int((found_nC.argmax(axis=1) != reference_nC.argmax(axis=1)).sum())
    if not worst <= tolerance.probability or (flips and not tolerance.labels_may_change):
        raise ParityError(
            f"{what} differs from {reference} on {images} images: max |Δp| {worst:.2e} (at most "
            f"{tolerance.probability:.0e} is allowed), {flips} labels changed. It was not kept. {advice}"
        )
    return Parity(images=images, max_abs_prob_delta=worst, label_flips=flips, reference=reference)


def check_embeddings(reference_nTD: Floats, found_nTD: Floats, tolerance: Tolerance, *, what: str) -> float:
    """Return the largest difference of image embeddings over the largest value of the reference.

    Raises ParityError when a value is not finite or the tolerance is exceeded.
    """
    if not np.isfinite(found_nTD).all():
        raise ParityError(f"{what}: image embeddings are not finite. Please report this with the checkpoint's name.")
    worst = float(np.abs(found_nTD.astype(np.float64) - reference_nTD).max() / np.abs(reference_nTD).max())
    if not worst <= tolerance.embedding:
        raise ParityError(
            f"{what}: image embeddings differ from the torch path by {worst:.2e} of their largest value (at most "
            f"{tolerance.embedding:.0e} is allowed). It was not kept. Please report this with the checkpoint's name."
        )
    return worst
