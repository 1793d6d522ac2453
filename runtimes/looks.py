"""An image as its readers show it, at the size of a guard or language model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from models.errors import ImageFileError
from models.image import MAX_PIXELS, View, open_views, to_views
from models.preprocessing import Preprocessing

__all__ = ["ImageSource", "Looks", "look"]

ImageSource: TypeAlias = "Path | str | bytes | Image.Image"


@dataclass(frozen=True, eq=False)
class Looks:
    """The views of an image whose pixels, uint8 H x W x 3, differ; ``picture`` is the first, the usual one, in full."""

    picture: Image.Image
    names: tuple[str, ...]
    pixels: tuple[npt.NDArray[np.uint8], ...]

    def named(self, at: int) -> str | None:
        """Return the name of a view, None where there is only one."""
        return self.names[at] if len(self.names) > 1 else None


def look(
    source: ImageSource, preprocessing: Preprocessing | None, where: str, *, max_pixels: int = MAX_PIXELS
) -> Looks:
    """Read an image once; without ``preprocessing`` at its own size.

    Raises ImageFileError for what is no image, cannot be read as a whole, or not in every way that readers show it.
    """
    picture: Image.Image | None = None
    found: dict[str, npt.NDArray[np.uint8]] = {}
    for view in _views(source, where, max_pixels):
        picture = picture or view.image
        pixels = np.array(view.image, dtype=np.uint8) if preprocessing is None else preprocessing.apply(view.image)
        if not any(np.array_equal(pixels, other) for other in found.values()):
            found[view.name] = pixels
    assert picture is not None  # there is a first view, or an error
    return Looks(picture, tuple(found), tuple(found.values()))


def _views(source: ImageSource, where: str, max_pixels: int) -> Iterator[View]:
    if isinstance(source, Image.Image):
        return to_views(source, where=where)
    if not isinstance(source, (str, os.PathLike, bytes)):
        raise ImageFileError(f"an image is a file's name, its bytes or an opened image, not {type(source).__name__}")
    return open_views(source if isinstance(source, bytes) else Path(source), max_pixels=max_pixels)
