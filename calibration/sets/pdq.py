"""PDQ, the perceptual hash that trust-and-safety teams exchange: 256 signs of a picture's 16 × 16 lowest frequencies.

Source: Facebook, “The TMK+PDQF video-hashing algorithm and the PDQ image-hashing algorithm” (2019). Written from the
paper in NumPy, because `pdqhash`, the bindings of the reference, has no wheels for Linux and takes 50 ms a megapixel.
Blurring and sampling are linear, rows and columns apart, so both are one matrix a side. A picture that is mirrored or
turned has the same frequencies, transposed or with other signs, and needs no second pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

__all__ = ["BITS", "ORIENTATIONS", "PdqHash", "distances", "oriented", "pdq_hash"]

BITS = 256
SAMPLED = 64
FREQUENCIES = 16
BLURS = 2
"""Passes of the box filter: two make a tent."""
GRADIENT_UNITS = 90
"""Divisor that makes a sum of gradients a quality from 0 to 100."""

ORIENTATIONS = (
    "",
    "turned 90° clockwise",
    "turned 180°",
    "turned 90° anticlockwise",
    "mirrored",
    "mirrored and turned 90° clockwise",
    "mirrored and turned 180°",
    "mirrored and turned 90° anticlockwise",
)
"""How a picture was changed that :func:`oriented` with this number changes back."""

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class PdqHash:
    """The hash of a picture in all orientations.

    ``signs`` is float32 8 × 256, 1 for a bit that is set and -1 otherwise, so that hashes are compared by a matrix
    product. ``quality`` is from 0 (flat) to 100; below 50 the hash says little.
    """

    signs: Floats
    quality: int


def oriented(picture: NDArray[np.generic], orientation: int) -> NDArray[np.generic]:
    """Return H × W (× C) pixels turned anticlockwise ``orientation % 4`` times, from 4 on mirrored afterwards."""
    turned = np.rot90(picture, orientation % 4)
    return turned[:, ::-1] if orientation >= 4 else turned


def pdq_hash(luminance_HW: Floats) -> PdqHash:
    """Hash luminance from 0 to 255. Raises ValueError for an empty picture."""
    height, width = luminance_HW.shape
    sampled: Floats = np.asarray(_sampling(height) @ luminance_HW @ _sampling(width).T, np.float32)
    frequencies = _cosines() @ sampled @ _cosines().T
    turns = [frequencies]
    for _ in range(3):
        turns.append(turns[-1].T * _PARITY[:, None])
    all_orientations = np.stack([*turns, *(turn * _PARITY for turn in turns)]).reshape(len(ORIENTATIONS), BITS)
    # the lower of the two middle values, as the reference takes it
    median = np.partition(all_orientations, BITS // 2 - 1, axis=1)[:, BITS // 2 - 1 : BITS // 2]
    return PdqHash(np.where(all_orientations > median, np.float32(1), np.float32(-1)), _quality(sampled))


def distances(signs_QB: Floats, others_NB: Floats) -> Floats:
    """Return the number of bits in which each of Q hashes differs from each of N: Q × N."""
    return np.asarray((BITS - signs_QB @ others_NB.T) / 2, np.float32)


def _quality(sampled: Floats) -> int:
    gradients = [np.trunc(np.diff(sampled, axis=axis) * (100 / 255)) for axis in (0, 1)]
    return min(100, int(sum(float(np.abs(gradient).sum()) for gradient in gradients) / GRADIENT_UNITS))


@lru_cache(maxsize=64)
def _sampling(size: int) -> Floats:
    """Return the matrix 64 × ``size`` that blurs a line of pixels twice and samples it at 64 places."""
    window = (size + 2 * SAMPLED - 1) // (2 * SAMPLED)
    right = window // 2
    left = window - 1 - right
    places = ((np.arange(SAMPLED) + 0.5) * size / SAMPLED).astype(int)
    weights = np.zeros((SAMPLED, size))
    weights[np.arange(SAMPLED), places] = 1
    for _ in range(BLURS):
        spread = np.zeros_like(weights)
        for middle in range(size):
            box = slice(max(0, middle - left), min(size, middle + right + 1))
            spread[:, box] += weights[:, middle : middle + 1] / (box.stop - box.start)
        weights = spread
    return weights.astype(np.float32)


@lru_cache(maxsize=1)
def _cosines() -> Floats:
    """Return the discrete cosine transform's rows 1 to 16 of 64; row 0, the mean, is left out."""
    row, column = np.arange(1, FREQUENCIES + 1)[:, None], np.arange(SAMPLED)[None]
    cosines = np.sqrt(2 / SAMPLED) * np.cos(np.pi / (2 * SAMPLED) * row * (2 * column + 1))
    return np.asarray(cosines, np.float32)


_PARITY = np.where(np.arange(1, FREQUENCIES + 1) % 2, np.float32(-1), np.float32(1))
"""Sign that a cosine of each frequency takes when its axis is reversed."""
