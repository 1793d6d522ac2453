"""Corruptions are functions of the image alone, within their ranges, and never something else than was asked for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from calibration.labelled.corruptions import KINDS, Corruption, corruption_of, parse_corruptions
from safevlm.errors import InputError

SIZES = ((1, 1), (7, 3), (64, 48), (200, 1))


def scene(size: tuple[int, int] = (64, 48), seed: int = 0) -> Image.Image:
    """Return an image with edges, colours and texture."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
    return coarse.resize(size, Image.Resampling.NEAREST)


def pixels(image: Image.Image) -> tuple[tuple[int, int], bytes]:
    return image.size, image.tobytes()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_the_same_image_gives_the_same_pixels_at_every_strength(kind: str, size: tuple[int, int]) -> None:
    limits = KINDS[kind]
    for strength in {limits.lowest, limits.default, limits.highest, *limits.steps}:
        image = scene(size)
        once, again = (Corruption(kind, strength)(image) for _ in range(2))
        assert pixels(once) == pixels(again) and once.mode == "RGB" and min(once.size) >= 1
        assert pixels(image) == pixels(scene(size)), "the image given is as it was"


@pytest.mark.parametrize("kind", KINDS)
def test_every_step_changes_the_image_and_more_than_the_last(kind: str) -> None:
    image = scene()
    levels = np.asarray(image, np.float64)
    changes = []
    for strength in KINDS[kind].steps:
        found = Corruption(kind, strength)(image)
        if found.size != image.size:
            changes.append(1 - found.width * found.height / (image.width * image.height))
        else:
            changes.append(float(np.abs(np.asarray(found, np.float64) - levels).mean()))
    assert changes[0] > 0 and changes == sorted(changes)
    assert KINDS[kind].default in KINDS[kind].steps


@pytest.mark.parametrize("kind", ["crop", "noise", "text"])
def test_what_is_random_differs_between_images(kind: str) -> None:
    ground = [Image.new("RGB", (64, 64), (100, 100, shade)) for shade in range(20)]
    added = {
        (np.asarray(Corruption(kind, KINDS[kind].default)(image), np.int64)[..., 0] - 100).tobytes() for image in ground
    }
    if kind == "crop":  # of a plain image every part is the same: look at where it was cut
        ramps = [np.arange(64, dtype=np.uint8)[None].repeat(64, 0) + np.uint8(shade) for shade in range(20)]
        cuts = [Corruption(kind, 0.3)(Image.fromarray(np.stack([each] * 3, -1))) for each in ramps]
        added = {bytes([np.asarray(cut)[0, 0, 0] - shade]) for shade, cut in enumerate(cuts)}
    assert len(added) > 5


def test_noise_of_a_large_image_is_that_of_its_strips() -> None:
    image = Image.new("RGB", (1200, 1000), (128, 128, 128))
    noise = np.asarray(Corruption("noise", 20)(image), np.float64) - 128
    assert noise.std() == pytest.approx(20, rel=0.02) and abs(noise.mean()) < 0.1


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.sampled_from(sorted(KINDS)), st.floats(0, 1))
def test_what_is_written_is_what_is_read(kind: str, share: float) -> None:
    limits = KINDS[kind]
    strength = limits.lowest + share * (limits.highest - limits.lowest)
    one = corruption_of(f"{kind}:{round(strength) if limits.whole else strength}")
    assert corruption_of(str(one)) == one and parse_corruptions(f"{one}, {one}") == (one,)


def test_a_kind_without_a_strength_has_its_default() -> None:
    assert [str(each) for each in parse_corruptions(",".join(KINDS))] == [
        f"{name}:{kind.default:g}" for name, kind in KINDS.items()
    ]


@pytest.mark.parametrize("text", ["jpg", "", "jpeg,", "jpeg:50,,blur", "none", "jpeg 50"])
def test_an_unknown_corruption_is_refused_with_those_that_there_are(text: str) -> None:
    with pytest.raises(InputError, match=r"unknown corruption. Allowed: jpeg \(JPEG quality, 5 to 95, default 50\)"):
        parse_corruptions(text)


@pytest.mark.parametrize(
    "text", ["jpeg:", "jpeg:4", "jpeg:50.5", "jpeg:96", "blur:nan", "blur:-1", "noise:inf", "grey:x"]
)
def test_a_strength_that_is_not_allowed_is_refused_with_the_range(text: str) -> None:
    kind = text.partition(":")[0]
    with pytest.raises(InputError, match=rf"strength of {kind} must be .* from .* to .*such as {kind}:"):
        parse_corruptions(text)
