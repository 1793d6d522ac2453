"""The colours of an image as a reader shows them that honours its ICC profile or its gamma.

Most profiles (sRGB, Display P3, grey at a display's gamma) leave an image what it is, a little more or less saturated:
that counts for nothing here. One of far wider colours (Adobe RGB, ProPhoto) or that turns light to dark, and a gamma
far from a display's, show another image.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from PIL import Image

__all__ = ["other_colours"]

DISPLAY_GAMMA = 2.2
TONE_TOLERANCE = 24
"""Grey levels by which a tone may move: gamma 1.8 shown at 2.2 moves by 17."""
COLOUR_TOLERANCE = 120
"""Levels by which a channel of a saturated colour may move: Display P3's by 96, Adobe RGB's by 128."""
LUT_TAGS = (b"A2B0", b"A2B1", b"A2B2", b"D2B0", b"D2B1", b"D2B2")


def other_colours(colour: Image.Image, profile: object, gamma: object) -> Iterator[tuple[str, Image.Image]]:
    """Yield names and RGB images for an image of mode L, RGB or CMYK whose file states a profile or a gamma.

    Nothing comes of a profile that LittleCMS cannot read or that is made for another mode: readers ignore it, too.
    """
    if isinstance(profile, bytes) and profile and not _is_ordinary(profile, colour.mode):
        transform = _transform(profile, colour.mode)
        if transform is not None:
            yield "colour-managed", transform.apply(colour)
    if isinstance(gamma, float) and gamma > 0 and colour.mode in ("L", "RGB"):
        levels = np.arange(256) / 255
        table = np.rint(255 * levels ** (1 / (gamma * DISPLAY_GAMMA))).astype(int)
        if abs(table - np.arange(256)).max() > TONE_TOLERANCE:
            yield "gamma applied", colour.convert("RGB").point(table.tolist() * 3)


class _Transform:
    """LittleCMS's way from a profile to sRGB."""

    def __init__(self, profile: bytes, mode: str) -> None:
        from PIL import ImageCms

        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        self._transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")

    def apply(self, image: Image.Image) -> Image.Image:
        """Return a new RGB image."""
        result = Image.new("RGB", image.size)
        self._transform.apply(image, result)
        return result


@lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> _Transform | None:
    from PIL import ImageCms

    try:
        return _Transform(profile, mode)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


@lru_cache(maxsize=32)
def _is_ordinary(profile: bytes, mode: str) -> bool:
    """Say whether a profile of curves and a matrix moves no tone and no colour far."""
    tags = profile[132 : 132 + 12 * int.from_bytes(profile[128:132], "big")]
    if mode == "CMYK" or any(tag in tags for tag in LUT_TAGS):
        return False
    transform = _transform(profile, mode)
    if transform is None:
        return True
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
    if _moved(transform, ramp, mode) > TONE_TOLERANCE:
        return False
    steps = np.array([0, 32, 64, 96, 128, 160, 192, 224, 255], np.uint8)
    cube = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(-1, 3)
    axes = np.concatenate([ramp * np.array(axis, np.uint8) for axis in np.eye(3)])
    return mode == "L" or _moved(transform, np.concatenate([cube, axes]), mode) <= COLOUR_TOLERANCE


def _moved(transform: _Transform, levels: np.ndarray, mode: str) -> int:  # type: ignore[type-arg]
    image = Image.fromarray(levels[None]).convert(mode)
    return int(abs(np.asarray(transform.apply(image)).astype(int) - np.asarray(image.convert("RGB")).astype(int)).max())
