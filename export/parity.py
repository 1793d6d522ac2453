"""Compare an exported file with the torch path that it was made from: the last step of every export.

Shapes: n images, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.errors import ParityError
from models.manifest import Parity

__all__ = ["TOLERANCES", "Tolerance", "check_parity"]

Floats = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """The largest change of a probability and the share of changed labels that a precision may cause."""

    probability: float
    flips: float


TOLERANCES: Mapping[str, Tolerance] = {
    "fp32": Tolerance(probability=1e-5, flips=0.0),
    "fp16": Tolerance(probability=2e-2, flips=0.01),
}


def check_parity(reference_nC: Floats, found_nC: Floats, precision: str, *, what: str) -> Parity:
    """Return the agreement of two sets of probabilities for the same n images.

    Errors: ParityError when a value is not finite, or the precision's tolerance is exceeded; ``what`` names
    the file in the message.
    """
    delta = np.abs(found_nC.astype(np.float64) - reference_nC)
    flips = int((found_nC.argmax(axis=1) != reference_nC.argmax(axis=1)).sum())
    tolerance = TOLERANCES[precision]
    worst = float(delta.max())
    if not np.isfinite(found_nC).all():
        raise ParityError(f"{what}: {int((~np.isfinite(found_nC)).sum())} probabilities are not finite.")
    if worst > tolerance.probability or flips > tolerance.flips * len(reference_nC):
        raise ParityError(
            f"{what} differs from the torch path on {len(reference_nC)} images: max |Δp| {worst:.2e} (at most "
            f"{tolerance.probability:.0e} is allowed for {precision}), {flips} labels changed. Nothing was written. "
            "Please report this with the checkpoint's name; fp32 is the safest precision."
        )
    return Parity(
        images=len(reference_nC),
        max_abs_prob_delta=worst,
        label_flips=flips,
        reference="transformers' own forward pass in float32",
    )
