"""PDQ: the reference's bits where it is installed, and orientations by signs and transposes."""

from __future__ import annotations

import numpy as np
import pytest

from calibration.sets.pdq import BITS, ORIENTATIONS, distances, oriented, pdq_hash

NUMBERS = range(len(ORIENTATIONS))


def smooth(seed: int, height: int = 192, width: int = 256) -> np.ndarray:
    """Return luminance with structure at all low frequencies, as photographs have."""
    rng = np.random.default_rng(seed)
    down, across = np.arange(height)[:, None] / height, np.arange(width)[None] / width
    waves = sum(
        rng.normal()
        / (1 + u + v)
        * np.cos(np.pi * (u * down + rng.uniform()))
        * np.cos(np.pi * v * across + rng.normal())
        for u in range(12)
        for v in range(12)
    )
    waves = (waves - np.min(waves)) / np.ptp(waves)
    return np.asarray(waves * 255, np.float32)


def test_the_hash_of_every_orientation_is_that_of_the_turned_picture() -> None:
    picture = smooth(0, 256, 256)
    hashed = pdq_hash(picture)
    for number in NUMBERS:
        apart = distances(pdq_hash(np.ascontiguousarray(oriented(picture, number))).signs[:1], hashed.signs)[0]
        assert apart[number] == apart.min() <= 40, (ORIENTATIONS[number], apart)
        assert np.sort(apart)[1] > 60


def test_half_of_the_bits_are_set_and_others_differ() -> None:
    hashed, other = pdq_hash(smooth(1)), pdq_hash(smooth(2))
    assert set(np.unique(hashed.signs)) == {-1.0, 1.0}
    assert (hashed.signs > 0).sum(axis=1).tolist() == [BITS // 2] * len(ORIENTATIONS)
    assert distances(hashed.signs, other.signs).min() > 70


def test_the_hash_survives_noise_brightness_and_size() -> None:
    picture = smooth(3, 256, 384)
    noisy = picture * 0.7 + 20 + np.random.default_rng(0).normal(0, 4, picture.shape)
    small = picture.reshape(128, 2, 192, 2).mean(axis=(1, 3))
    for changed in (noisy.astype(np.float32), small):
        assert distances(pdq_hash(changed).signs[:1], pdq_hash(picture).signs[:1])[0, 0] <= 24


def test_a_flat_picture_has_no_quality_and_a_busy_one_all() -> None:
    assert pdq_hash(np.full((50, 70), 99, np.float32)).quality == 0
    assert pdq_hash(np.random.default_rng(0).uniform(0, 255, (64, 64)).astype(np.float32)).quality == 100


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (64, 64), (127, 129), (700, 500)])
def test_all_sizes_are_hashed(size: tuple[int, int]) -> None:
    assert pdq_hash(smooth(4, *size) if min(size) > 1 else np.ones(size, np.float32)).signs.shape == (8, BITS)


@pytest.mark.parametrize("size", [(64, 64), (192, 256), (300, 500), (512, 400), (701, 997)])
def test_bits_and_quality_are_the_references(size: tuple[int, int]) -> None:
    pdqhash = pytest.importorskip("pdqhash", reason="pdqhash is not installed; it builds from source")
    rgb = np.stack([smooth(5, *size)] * 3, axis=-1).astype(np.uint8)
    ours = pdq_hash(rgb.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32))
    theirs, quality = pdqhash.compute_dihedral(rgb)
    signs = np.stack(theirs)[:, ::-1].astype(np.float32) * 2 - 1
    apart = distances(ours.signs, signs)
    assert apart[[0, 1, 2, 3], [0, 1, 2, 3]].max() <= 4 and apart.min(axis=1).max() <= 4
    assert abs(ours.quality - quality) <= 1
