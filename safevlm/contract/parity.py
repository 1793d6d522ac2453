"""Compare two paths through a guard on the same images: the last step of every export, and the proof of an engine.

Shapes: n images, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from safevlm.contract.manifest import Parity
from safevlm.errors import ParityError

__all__ = [
    "ENGINE_TOLERANCES",
    "TOLERANCES",
    "Tolerance",
    "check_embeddings",
    "check_parity",
    "judge_of",
    "within",
]

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
ENGINE_TOLERANCES: Mapping[str, Tolerance] = {
    # Another machine sums in another order; the export itself, on one machine, is held to 1e-5.
    "fp32": Tolerance(probability=1e-4, labels_may_change=False, embedding=1e-3),
    "fp16": TOLERANCES["fp16"],
    # Compared with the INT8 file, which was judged when it was made: a last bit moves a value to the next step.
    "int8": Tolerance(probability=5e-2, labels_may_change=True, embedding=5e-2),
}


def judge_of(precision: str) -> str:
    """Return the precision of the ONNX file that an engine is compared with."""
    return precision if precision == "int8" else "fp32"


def within(parity: Parity, tolerance: Tolerance) -> bool:
    """Say whether two paths agree as a precision must."""
    delta, moved = parity.max_abs_prob_delta, parity.max_rel_embedding_delta
    return (
        (delta is None or delta <= tolerance.probability)
        and (not parity.label_flips or tolerance.labels_may_change)
        and (moved is None or moved <= tolerance.embedding)
    )


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
    parity = Parity(
        images=images,
        max_abs_prob_delta=float(np.abs(found_nC.astype(np.float64) - reference_nC).max()),
        label_flips=int((found_nC.argmax(axis=1) != reference_nC.argmax(axis=1)).sum()),
        reference=reference,
    )
    if not within(parity, tolerance):
        raise ParityError(
            f"{what} differs from {reference} on {images} images: max |Δp| {parity.max_abs_prob_delta:.2e} (at most "
            f"{tolerance.probability:.0e} is allowed), {parity.label_flips} labels changed. The file was "
            f"discarded. {advice}"
        )
    return parity


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
            f"{tolerance.embedding:.0e} is allowed). The file was discarded. Please report this with the "
            "checkpoint's name."
        )
    return worst
