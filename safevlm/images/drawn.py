"""Images drawn from a seed, to compare two runtimes on where there is no data set: a device has only this package."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from safevlm.contract.preprocessing import Preprocessing

__all__ = ["drawn_images"]

CELLS = (2, 5, 13, 34)
"""Coloured cells along a side, from surfaces to texture."""


def drawn_images(preprocessing: Preprocessing, seed: int, count: int) -> npt.NDArray[np.uint8]:
    """Return ``count`` images as uint8 n × H × W × 3 at the contract's size; the first of them whatever ``count`` is.

    Each mixes grids of random colours, from coarse to fine, in shares of its own, so that edges, surfaces and texture
    of every strength occur. Two machines draw the same images but for the last bit of a grey level.
    """
    height, width = preprocessing.height, preprocessing.width
    images = np.empty((count, height, width, 3), np.uint8)
    for image, own_seed in zip(images, np.random.SeedSequence(seed).spawn(count), strict=True):
        image[:] = _draw(np.random.default_rng(own_seed), height, width)
    return images


def _draw(rng: np.random.Generator, height: int, width: int) -> npt.NDArray[np.uint8]:
    shares = rng.dirichlet(np.full(len(CELLS), 0.5))
    drawn = np.zeros((height, width, 3))
    for cells, share in zip(CELLS, shares, strict=True):
        colours = rng.integers(0, 256, (cells, cells, 3))
        down, across = (np.arange(side) * cells // side for side in (height, width))
        drawn += share * colours[down[:, None], across]
    return drawn.astype(np.uint8)
