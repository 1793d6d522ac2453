"""From a picture to the pixels a guard reads: the contract of one checkpoint, in Pillow and numpy.

Legend: ``N`` pictures, ``H`` and ``W`` the contract's height and width; values are grey levels 0..255
until :meth:`Preprocessing.normalise`. Sizes are given as (height, width), Pillow's own as (width, height).

The arithmetic follows transformers 5.17: ``image_processing_backends.PilBackend`` with
``image_transforms.{get_resize_output_image_size, resize, center_crop}`` for CLIP, SigLIP, Gemma-3 and
Qwen2-VL, and ``image_processing_pil_llava.pad_to_square`` for LLaVA-1.5's ``image_aspect_ratio: pad``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, model_validator

from models.errors import InputError

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

LARGEST_SQUARE = 100_000_000
"""Pixels of the largest square that a tall picture is padded to before it is resized (400 MB in Pillow)."""

_Side = Annotated[int, Field(gt=0, le=65_535)]
_Triple = tuple[float, float, float]


class Preprocessing(BaseModel):
    """How a picture becomes H x W x 3 grey levels, and those the values of the vision tower.

    ``fit`` says what happens to a picture of another shape: ``squash`` resizes it straight to H x W (Gemma-3;
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
    mean: _Triple
    std: _Triple
    rescale: float = Field(default=1 / 255, gt=0)
    layout: Literal["NHWC"] = "NHWC"
    colour: Literal["RGB"] = "RGB"

    @model_validator(mode="after")
    def _check(self) -> Preprocessing:
        if (self.fit == "crop") != (self.shortest_edge is not None):
            raise ValueError(
                f"shortest_edge is for fit 'crop' and only for it: {self.fit}, {self.shortest_edge}"
            )
        if min(self.std) <= 0:
            raise ValueError(f"std must be above 0 in every channel: {self.std}")
        return self

    @classmethod
    def from_processor(
        cls, processor: Mapping[str, Any], *, family: str, grid: tuple[int, int] | None = None
    ) -> Preprocessing:
        """Read the settings of a Hugging Face ``preprocessor_config.json``.

        ``grid`` is the fixed (height, width) of a tower that takes many sizes (Qwen2.5-VL; 448 x 448 unless
        the processor's own pixel limits exclude it). A key or value that this contract cannot express is an
        :class:`InputError` naming it. ``image_aspect_ratio`` of LLaVA's config may stand among the keys.
        """
        from models.processor_config import read_processor

        return read_processor(processor, family=family, grid=grid)

    def apply(self, image: Image.Image) -> npt.NDArray[np.uint8]:
        """Return the grey levels, H x W x 3, of an upright RGB picture (see ``models.image``)."""
        if image.mode != "RGB":
            raise InputError(
                f"a picture of mode {image.mode} cannot be preprocessed, only RGB: use models.image.to_rgb"
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
        """Resize only the part that the crop keeps: a 1 x 65,000 picture would need gigabytes otherwise.

        One axis at a time, horizontal first, as Pillow resizes a whole picture; with a box it may choose the
        other order, and rounding to whole levels between the passes would then show.
        """
        assert self.shortest_edge is not None
        width, height = image.size
        short = min(width, height)
        scaled_width = int(self.shortest_edge * width / short)
        scaled_height = int(self.shortest_edge * height / short)
        columns, rows = min(self.width, scaled_width), min(self.height, scaled_height)
        x0, x1, left = _kept(width, scaled_width, self.width)
        y0, y1, top = _kept(height, scaled_height, self.height)
        resample = PIL_FILTERS[self.filter]
        across = image.resize((columns, height), resample=resample, box=(x0, 0, x1, height))
        kept = across.resize((columns, rows), resample=resample, box=(0, y0, columns, y1))
        if kept.size == (self.width, self.height):
            return kept
        # What the crop lacks is black, as in transformers.
        canvas = Image.new("RGB", (self.width, self.height))
        canvas.paste(kept, (left, top))
        return canvas

    def _pad(self, image: Image.Image) -> Image.Image:
        """Pad to a square and resize, without holding a square much larger than the picture.

        A wide picture is narrowed first, which is Pillow's own first pass. A tall one whose square would
        be too large is shortened first: the passes change places, which rounds differently at most.
        """
        width, height = image.size
        long = max(width, height)
        if width > height:
            image = self._resize(image, height, self.width)
        elif long * long > LARGEST_SQUARE:
            image = self._resize(image, self.height, width)
        size = (image.width, long) if width > height else (long, image.height)
        canvas = Image.new("RGB", size, tuple(int(value * 255) for value in self.mean))
        canvas.paste(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
        return self._resize(canvas, self.height, self.width)


def _kept(side: int, scaled: int, crop: int) -> tuple[float, float, int]:
    """Return what a centred crop of a side keeps: from and to, before scaling, and its place in the crop."""
    start = (scaled - crop) // 2
    first, last = max(start, 0), min(max(start, 0) + crop, scaled)
    return first * side / scaled, min(last * side / scaled, side), max(-start, 0)
