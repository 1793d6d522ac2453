"""Thumbnails of parts of one picture are laid over each other; those of two pictures do not agree."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from calibration.sets.alignment import MOST_CUT, agreements

Shares = tuple[float, float, float, float]


def photograph(seed: int, size: int = 400) -> Image.Image:
    """Return smooth noise at three scales."""
    rng = np.random.default_rng(seed)
    layers = [
        Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)).resize(
            (size, size), Image.Resampling.BICUBIC
        )
        for cells in (5, 12, 30)
    ]
    return Image.blend(Image.blend(layers[0], layers[1], 0.4), layers[2], 0.3)


def thumbnail(picture: Image.Image, cut: Shares = (0, 0, 0, 0)) -> np.ndarray:
    width, height = picture.size
    box = (cut[0] * width, cut[1] * height, (1 - cut[2]) * width, (1 - cut[3]) * height)
    return np.asarray(picture.resize((64, 64), Image.Resampling.BILINEAR, box=box))


@pytest.mark.parametrize("cut", [(0.03,) * 4, (0.06,) * 4, (0.0, 0.07, 0.0, 0.0), (0.06, 0.0, 0.02, 0.05)])
@pytest.mark.parametrize("swapped", [False, True])
def test_a_cut_is_found_in_either(cut: Shares, swapped: bool) -> None:
    pair = [thumbnail(photograph(0)), thumbnail(photograph(0), cut)]
    one, other = reversed(pair) if swapped else pair
    (seen,) = agreements(one[None], other[None])
    assert seen is not None and seen.correlation > 0.97 and seen.blocks > 0.95 and seen.rms < 6
    assert seen.cut == pytest.approx(max(cut), abs=0.015)


def test_text_and_brightness_do_not_move_it() -> None:
    written = photograph(1)
    ImageDraw.Draw(written).text((20, 320), "You won't believe this", font=ImageFont.load_default(32), fill="white")
    written = written.point(lambda level: round(level * 0.6 + 30))
    (seen,) = agreements(thumbnail(photograph(1))[None], thumbnail(written, (0.03,) * 4)[None])
    assert seen is not None and seen.blocks > 0.6 and seen.cut == pytest.approx(0.03, abs=0.015)


def test_other_pictures_do_not_agree() -> None:
    ones = np.stack([thumbnail(photograph(seed)) for seed in range(8)])
    others = np.stack([thumbnail(photograph(seed)) for seed in range(20, 28)])
    found = [seen for seen in agreements(ones, others) if seen is not None]
    assert all(seen.blocks < 0.3 for seen in found)


def test_pairs_are_compared_each_by_itself() -> None:
    same, flat, other = thumbnail(photograph(2)), np.full((64, 64, 3), 90, np.uint8), thumbnail(photograph(3))
    found = agreements(np.stack([other, same, flat]), np.stack([same, same, flat]))
    assert found[0] is None or found[0].blocks < 0.3
    assert found[1] is not None and found[1].correlation == pytest.approx(1, abs=1e-3) and found[1].cut < 0.002
    assert found[2] is None
    assert agreements(np.zeros((0, 64, 64, 3), np.uint8), np.zeros((0, 64, 64, 3), np.uint8)) == []


def test_no_more_is_cut_than_allowed() -> None:
    (seen,) = agreements(thumbnail(photograph(4))[None], thumbnail(photograph(4), (0.15, 0.0, 0.0, 0.15))[None])
    assert seen is None or seen.cut <= MOST_CUT + 1e-6
