"""Drawn images: the same for a seed, of every kind, and told apart by a guard."""

from __future__ import annotations

import numpy as np

from safevlm.contract.preprocessing import Preprocessing
from safevlm.images.drawn import drawn_images

CONTRACT = Preprocessing(
    height=20, width=36, fit="squash", filter="bilinear", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
)


def test_a_seed_draws_the_same_images_and_another_seed_others() -> None:
    images = drawn_images(CONTRACT, 7, 6)
    assert images.shape == (6, 20, 36, 3) and images.dtype == np.uint8
    np.testing.assert_array_equal(drawn_images(CONTRACT, 7, 4), images[:4])
    assert all((one != other).mean() > 0.5 for one, other in zip(drawn_images(CONTRACT, 8, 6), images, strict=True))


def test_surfaces_and_texture_both_occur() -> None:
    images = drawn_images(CONTRACT, 0, 24).astype(int)
    steps = np.abs(np.diff(images, axis=2)).mean(axis=(1, 2, 3))
    assert steps.max() > 5 * steps.min()
    assert images.min() == 0 or images.max() > 230
