"""What happens to images on their way to a guard: compression, scaling, cropping, blur, noise, captions, colour.

A corruption is a function of the image alone: what is random in it is drawn from the image's own pixels. Corrupted
images are therefore exchangeable wherever the images are, which is all that the promise of ``risk_control`` asks for.

It is applied to the image as a device decodes it, before the guard's preprocessing. Pixels are those of the image, not
of the guard's input.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

import click
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from safevlm.errors import InputError

__all__ = ["KINDS", "Corruption", "Kind", "corruption_of", "parse_corruptions", "stated_kinds", "under_option"]

Command = TypeVar("Command", bound=Callable[..., Any])

CAPTIONS = ("breaking news", "look at this", "my holiday", "no comment", "sample", "thank you", "today only", "2026")
SMALLEST_TEXT = 6
"""Pixels; smaller letters are none."""
STRIP = 2**20
"""Pixels that are made noisy at once: the noise of a whole photograph would take a gigabyte."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of corruption and the strengths that it may have.

    ``steps`` are strengths from weak to strong; which direction is stronger differs from kind to kind.
    """

    meaning: str
    lowest: float
    highest: float
    default: float
    steps: tuple[float, ...]
    whole: bool = False
    """Whether a strength is a whole number."""
    apply: Callable[[Image.Image, float, np.random.Generator], Image.Image]

    @property
    def stated(self) -> str:
        """The meaning and the range, for help texts and messages."""
        return f"{self.meaning}, {self.lowest:g} to {self.highest:g}, default {self.default:g}"


@dataclass(frozen=True)
class Corruption:
    """A kind at a strength; as text ``jpeg:50``."""

    kind: str
    strength: float

    def __str__(self) -> str:
        return f"{self.kind}:{self.strength:g}"

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return an RGB image corrupted; the same image gives the same pixels."""
        digest = hashlib.sha256(f"{self.kind} {image.size}".encode())
        digest.update(image.tobytes())
        return KINDS[self.kind].apply(image, self.strength, np.random.default_rng(list(digest.digest())))


def parse_corruptions(text: str, option: str = "--under") -> tuple[Corruption, ...]:
    """Read ``jpeg:50,blur,noise``: kinds separated by commas, each with its strength or at its default; each once.

    Raises InputError for an unknown kind and for a strength outside the kind's range.
    """
    return tuple(dict.fromkeys(corruption_of(part.strip(), option) for part in text.split(",")))


def corruption_of(text: str, option: str = "--under") -> Corruption:
    """Read one corruption. Raises InputError as :func:`parse_corruptions` does."""
    name, colon, stated = text.partition(":")
    kind = KINDS.get(name.strip().lower())
    if kind is None:
        raise InputError(f"{option} {text!r}: unknown corruption. Allowed: {stated_kinds()}.")
    try:
        strength = float(stated if colon else kind.default)
    except ValueError:
        strength = math.nan
    if not kind.lowest <= strength <= kind.highest or (kind.whole and not strength.is_integer()):
        raise InputError(
            f"{option} {text!r}: the strength of {name} must be {'a whole number' if kind.whole else 'a number'} from "
            f"{kind.lowest:g} to {kind.highest:g} ({kind.meaning}), such as {name}:{kind.default:g}."
        )
    return Corruption(name.strip().lower(), float(f"{strength:g}"))


def stated_kinds() -> str:
    """Return all kinds with what their strengths mean."""
    return "; ".join(f"{name} ({kind.stated})" for name, kind in KINDS.items())


def under_option(what: str, *, default: str | None = None) -> Callable[[Command], Command]:
    """Return ``--under``, which :func:`parse_corruptions` reads; ``what`` begins its help text."""
    return click.option(
        "--under",
        metavar="LIST",
        default=default,
        show_default=default is not None,
        help=f"{what}, separated by commas, each at its default strength or as in jpeg:30: {stated_kinds()}.",
    )


def _jpeg(image: Image.Image, quality: float, _: np.random.Generator) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=int(quality))
    return Image.open(stream, formats=["JPEG"]).convert("RGB")


def _resize(image: Image.Image, factor: float, _: np.random.Generator) -> Image.Image:
    width, height = (max(1, round(side * factor)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BILINEAR)


def _crop(image: Image.Image, share: float, rng: np.random.Generator) -> Image.Image:
    width, height = (max(1, round(side * (1 - share))) for side in image.size)
    left, top = int(rng.integers(image.width - width + 1)), int(rng.integers(image.height - height + 1))
    return image.crop((left, top, left + width, top + height))


def _blur(image: Image.Image, radius: float, _: np.random.Generator) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(radius))


def _noise(image: Image.Image, deviation: float, rng: np.random.Generator) -> Image.Image:
    pixels = np.array(image)
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        strip = pixels[top : top + rows]
        noisy = strip + deviation * rng.standard_normal(strip.shape, dtype=np.float32)
        pixels[top : top + rows] = np.clip(np.rint(noisy), 0, 255)
    return Image.fromarray(pixels)


def _text(image: Image.Image, share: float, rng: np.random.Generator) -> Image.Image:
    """Write a white caption with a black outline across the image; it may run over the right edge."""
    written = image.copy()
    size = max(SMALLEST_TEXT, round(share * image.height))
    place = int(rng.integers(max(1, image.width // 2))), int(rng.integers(max(1, image.height - size)))
    ImageDraw.Draw(written).text(
        place,
        CAPTIONS[int(rng.integers(len(CAPTIONS)))],
        fill="white",
        font=ImageFont.load_default(size),
        stroke_width=max(1, size // 12),
        stroke_fill="black",
    )
    return written


def _gamma(image: Image.Image, exponent: float, _: np.random.Generator) -> Image.Image:
    levels = [round(255 * (level / 255) ** exponent) for level in range(256)]
    return image.point(levels * 3)


def _grey(image: Image.Image, share: float, _: np.random.Generator) -> Image.Image:
    return Image.blend(image, image.convert("L").convert("RGB"), share)


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "jpeg": Kind(
            meaning="JPEG quality",
            lowest=5,
            highest=95,
            default=50,
            steps=(90, 70, 50, 30, 10),
            whole=True,
            apply=_jpeg,
        ),
        "resize": Kind(
            meaning="remaining share of each side",
            lowest=0.05,
            highest=0.95,
            default=0.5,
            steps=(0.75, 0.5, 0.35, 0.25, 0.15),
            apply=_resize,
        ),
        "crop": Kind(
            meaning="share of each side cut off",
            lowest=0.01,
            highest=0.8,
            default=0.1,
            steps=(0.05, 0.1, 0.2, 0.3, 0.4),
            apply=_crop,
        ),
        "blur": Kind(
            meaning="radius in pixels",
            lowest=0.1,
            highest=50,
            default=1.5,
            steps=(0.5, 1, 1.5, 3, 5),
            apply=_blur,
        ),
        "noise": Kind(
            meaning="standard deviation in levels of 255",
            lowest=1,
            highest=128,
            default=10,
            steps=(5, 10, 20, 40, 80),
            apply=_noise,
        ),
        "text": Kind(
            meaning="height of a caption as a share of the image's",
            lowest=0.02,
            highest=0.5,
            default=0.1,
            steps=(0.05, 0.1, 0.15, 0.2, 0.3),
            apply=_text,
        ),
        "gamma": Kind(
            meaning="exponent, darker above 1",
            lowest=0.2,
            highest=5,
            default=1.5,
            steps=(1.25, 1.5, 2, 2.5, 3.5),
            apply=_gamma,
        ),
        "grey": Kind(
            meaning="share of the colour removed",
            lowest=0.1,
            highest=1,
            default=1,
            steps=(0.25, 0.5, 0.75, 1),
            apply=_grey,
        ),
    }
)
"""Every corruption by its name."""
