"""The views of an image at the size of a guard or language model, and what a guard says of each.

``safevlm.images.views`` tells which they are: what the file's readers show, the usual one first. Of each the guard
judges the whole and, where it is large, tiles (see ``runtimes.images.tiling``).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from runtimes.images.tiling import ViewMode, judged_pixels, shown
from safevlm.contract.preprocessing import Preprocessing
from safevlm.errors import ImageFileError
from safevlm.images.image import FORMATS, MAX_PIXELS, View, open_views, to_views
from safevlm.images.views import USUAL

if TYPE_CHECKING:
    pass

__all__ = ["ImageSource", "ImageViews", "read_views"]

ImageSource: TypeAlias = "Path | str | bytes | Image.Image"


@dataclass(frozen=True, eq=False)
class ImageViews:
    """The views of an image and their tiles, as far as their pixels, uint8 H x W x 3, differ.

    ``image`` is the usual view at the size that may be shown. The first ``own`` pixels are of it: the whole, then its
    tiles.
    """

    image: Image.Image
    names: tuple[str, ...]
    pixels: tuple[npt.NDArray[np.uint8], ...]
    own: int = 1

    def name(self, at: int) -> str | None:
        """Return the name of a view or tile, None where there is only one."""
        return self.names[at] if len(self.names) > 1 else None

    def is_hidden(self, at: int) -> bool:
        """Say whether pixels are of a view that is not the usual one: not of what is shown."""
        return at >= self.own


def read_views(
    source: ImageSource,
    preprocessing: Preprocessing | None,
    where: str,
    *,
    max_pixels: int = MAX_PIXELS,
    mode: ViewMode = "whole",
    formats: Collection[str] = FORMATS,
    sent: Callable[[Image.Image], Image.Image] | None = None,
) -> ImageViews:
    """Read an image once; without ``preprocessing`` at its own size.

    ``sent`` turns the usual view into what others are shown of it, such as a JPEG's pixels: those are judged.

    Raises ImageFileError for anything that is not an image, or cannot be read completely and in every way that readers
    show it.
    """
    usual: Image.Image | None = None
    own = 0
    found: dict[bytes, tuple[str, npt.NDArray[np.uint8]]] = {}
    for view in _views(source, where, max_pixels, formats):
        image = view.image if preprocessing is None else shown(view.image, preprocessing, mode)
        if usual is None and sent is not None:
            image = sent(image)
        for name, pixels in _pixels(view.name, image, preprocessing, mode):
            found.setdefault(hashlib.sha256(pixels.tobytes()).digest(), (name, pixels))
        if usual is None:
            usual, own = image, len(found)
    assert usual is not None  # there is a first view, or an error
    names, kept = zip(*found.values(), strict=True)
    return ImageViews(usual, names, kept, own)


def _pixels(
    view: str, image: Image.Image, preprocessing: Preprocessing | None, mode: ViewMode
) -> Iterator[tuple[str, npt.NDArray[np.uint8]]]:
    """Yield what is judged of a view, each with its name, such as "on white, tile 2 of 9"."""
    if preprocessing is None:
        yield view, np.array(image, dtype=np.uint8)
        return
    for tile, pixels in judged_pixels(image, preprocessing, mode):
        of = view if view != USUAL or not tile else ""
        yield ", ".join(part for part in (of, tile) if part), pixels


def _views(source: ImageSource, where: str, max_pixels: int, formats: Collection[str]) -> Iterator[View]:
    if isinstance(source, Image.Image):
        return to_views(source, where=where)
    if not isinstance(source, (str, os.PathLike, bytes)):
        raise ImageFileError(f"an image must be a file name, bytes or an opened image, not {type(source).__name__}")
    return open_views(source if isinstance(source, bytes) else Path(source), max_pixels=max_pixels, formats=formats)
