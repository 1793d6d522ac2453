"""From an image to the pixels a guard reads: the contract of one checkpoint, in Pillow and numpy.

Legend: ``N`` images, ``H`` and ``W`` the contract's height and width; values are grey levels 0..255
until :meth:`Preprocessing.normalise`. Sizes are given as (height, width), Pillow's own as (width, height).

The arithmetic follows transformers 5.17: ``image_processing_backends.PilBackend`` with
``image_transforms.{get_resize_output_image_size, resize, center_crop}`` for CLIP, SigLIP, Gemma-3 and
Qwen2-VL, and ``image_processing_pil_llava.pad_to_square`` for LLaVA-1.5's ``image_aspect_ratio: pad``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, model_validator

from safevlm.errors import InputError

__all__ = ["Filter", "Fit", "Preprocessing"]

Fit = Literal["squash", "crop", "pad"]
Filter = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]

PIL_FILTERS: Mapping[Filter, Image.Resampling] = {
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}

LARGEST_STEP = 100_000_000
"""Pixels of the largest image made on the way, 400 MB in Pillow; beyond it, see ``_crop`` and ``_pad``."""

MAX_AREA = 2**24
"""Pixels that a guard may read of one image: beyond every vision tower's (Qwen2.5-VL's own limit is 12.8 million)."""

_Side = Annotated[int, Field(gt=0, le=65_535)]
_Mean = Annotated[float, Field(ge=-255, le=255)]
_Std = Annotated[float, Field(ge=1e-6, le=255)]


class Preprocessing(BaseModel):
    """How an image becomes H x W x 3 grey levels, and those the values of the vision tower.

    ``fit`` says what happens to an image of another shape: ``squash`` resizes it straight to H x W (Gemma-3;
    Qwen2.5-VL at a fixed grid), ``crop`` resizes its shorter side to ``shortest_edge`` and cuts H x W out of
    the middle (CLIP), ``pad`` completes it to a square with the mean colour and resizes that (LLaVA-1.5).
    ``mean`` and ``std`` are of values in 0..1, red first.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    height: _Side
    width: _Side
    fit: Fit
    shortest_edge: _Side | None = None
    filter: Filter
    mean: tuple[_Mean, _Mean, _Mean]
    std: tuple[_Std, _Std, _Std]
    rescale: float = Field(default=1 / 255, ge=1e-6, le=1)
    layout: Literal["NHWC"] = "NHWC"
    colour: Literal["RGB"] = "RGB"

    @model_validator(mode="after")
    def _check(self) -> Preprocessing:
        if (self.fit == "crop") != (self.shortest_edge is not None):
            raise ValueError(
                f"fit 'crop' needs shortest_edge, and no other fit takes it: {self.fit}, {self.shortest_edge}"
            )
        if self.height * self.width > MAX_AREA:
            raise ValueError(f"{self.height} x {self.width} pixels are too many; at most {MAX_AREA:,} are allowed")
        if self.fit == "pad" and not 0 <= min(self.mean) <= max(self.mean) <= 1:
            raise ValueError(
                f"fit 'pad' fills with the mean colour, so mean must be 0 to 1 in every channel, not {self.mean}"
            )
        return self

    def apply(self, image: Image.Image) -> npt.NDArray[np.uint8]:
        """Return the grey levels, H x W x 3, of an upright RGB image (see ``safevlm.images.image``)."""
        if image.mode != "RGB":
            raise InputError(
                f"an image of mode {image.mode} cannot be preprocessed. Convert it to RGB with "
                "safevlm.images.image.to_rgb"
            )
        if self.fit == "crop":
            fitted = self._crop(image)
        elif self.fit == "pad":
            fitted = self._pad(image)
        else:
            fitted = self._resize(image, self.height, self.width)
        return np.array(fitted, dtype=np.uint8)

    def normalise(self, rgb: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Return N x 3 x H x W values from N x H x W x 3 grey levels: what the graph does itself."""
        scaled = rgb.astype(np.float32) * np.float32(self.rescale)
        normal = (scaled - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return np.ascontiguousarray(normal.transpose(0, 3, 1, 2))

    def _resize(self, image: Image.Image, height: int, width: int) -> Image.Image:
        return image.resize((width, height), resample=PIL_FILTERS[self.filter])

    def _crop(self, image: Image.Image) -> Image.Image:
        """Resize and cut; of an image so long that resizing it would take gigabytes, resize only what stays.

        Resizing a part rounds differently where Pillow then takes the two axes in the other order.
        """
        assert self.shortest_edge is not None
        width, height = image.size
        short = min(width, height)
        scaled_width = int(self.shortest_edge * width / short)
        scaled_height = int(self.shortest_edge * height / short)
        x0, x1, left = _kept(scaled_width, self.width)
        y0, y1, top = _kept(scaled_height, self.height)
        if scaled_width * scaled_height <= LARGEST_STEP:
            kept = self._resize(image, scaled_height, scaled_width).crop((x0, y0, x1, y1))
        else:
            across, down = width / scaled_width, height / scaled_height
            box = (x0 * across, y0 * down, min(x1 * across, width), min(y1 * down, height))
            kept = image.resize((x1 - x0, y1 - y0), resample=PIL_FILTERS[self.filter], box=box)
        if kept.size == (self.width, self.height):
            return kept
        # What the crop lacks is black, as in transformers.
        canvas = Image.new("RGB", (self.width, self.height))
        canvas.paste(kept, (left, top))
        return canvas

    def _pad(self, image: Image.Image) -> Image.Image:
        """Pad to a square and resize; an image too long for its square to be held is shortened first."""
        width, height = image.size
        square = [max(width, height)] * 2
        if square[0] ** 2 > LARGEST_STEP:
            long_axis = 0 if width > height else 1
            square[long_axis] = (self.width, self.height)[long_axis]
            image = self._resize(image, min(height, square[1]), min(width, square[0]))
        canvas = Image.new("RGB", (square[0], square[1]), tuple(int(value * 255) for value in self.mean))
        canvas.paste(image, ((square[0] - image.width) // 2, (square[1] - image.height) // 2))
        return self._resize(canvas, self.height, self.width)


def _kept(scaled: int, crop: int) -> tuple[int, int, int]:
    """Return what a centred crop keeps of a scaled side, from and to, and where that lies in the crop."""
    start = (scaled - crop) // 2
    first = max(start, 0)
    return first, min(first + crop, scaled), max(-start, 0)
