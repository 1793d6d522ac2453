"""The views of an image at the size of a guard or language model, and what a guard says of each.

``models.views`` tells which they are: what the file's readers show, the usual one first.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from models.errors import ImageFileError
from models.image import MAX_PIXELS, View, open_views, to_views
from models.preprocessing import Preprocessing

if TYPE_CHECKING:
    from runtimes.judge import Guard

__all__ = ["ImageSource", "ImageViews", "JudgedViews", "judge_views", "read_views"]

ImageSource: TypeAlias = "Path | str | bytes | Image.Image"


@dataclass(frozen=True, eq=False)
class ImageViews:
    """The views of an image whose pixels, uint8 H x W x 3, differ; ``image`` is the first, the usual one, in full."""

    image: Image.Image
    names: tuple[str, ...]
    pixels: tuple[npt.NDArray[np.uint8], ...]

    def name(self, at: int) -> str | None:
        """Return the name of a view, None where there is only one."""
        return self.names[at] if len(self.names) > 1 else None


@dataclass(frozen=True, eq=False)
class JudgedViews:
    """An image as the guard judged it: a row of probabilities for each view, none without a guard."""

    views: ImageViews
    probs: tuple[npt.NDArray[np.float32], ...] = ()
    embeddings: npt.NDArray[np.float32] | None = None
    """Of the usual view."""
    ms: Mapping[str, float] = field(default_factory=dict)


def read_views(
    source: ImageSource, preprocessing: Preprocessing | None, where: str, *, max_pixels: int = MAX_PIXELS
) -> ImageViews:
    """Read an image once; without ``preprocessing`` at its own size.

    Raises ImageFileError for what is no image, cannot be read as a whole, or not in every way that readers show it.
    """
    usual: Image.Image | None = None
    found: dict[str, npt.NDArray[np.uint8]] = {}
    for view in _views(source, where, max_pixels):
        usual = usual or view.image
        pixels = np.array(view.image, dtype=np.uint8) if preprocessing is None else preprocessing.apply(view.image)
        if not any(np.array_equal(pixels, other) for other in found.values()):
            found[view.name] = pixels
    assert usual is not None  # there is a first view, or an error
    return ImageViews(usual, tuple(found), tuple(found.values()))


def judge_views(
    source: ImageSource,
    guard: Guard | None,
    size: Preprocessing | None,
    *,
    share: bool,
    known: npt.NDArray[np.float32] | None = None,
) -> JudgedViews:
    """Decode an image once and judge it, if there is a guard and its verdict is not ``known``.

    ``size`` is the language model's, for images that only it judges; ``share`` asks for embeddings. Raises
    ImageFileError, and what the guard raises.
    """
    begun = time.perf_counter()
    views = read_views(source, size if guard is None else guard.runner.preprocessing, "the given image")
    decoded = time.perf_counter()
    ms = {"decode": (decoded - begun) * 1000}
    if guard is None:
        return JudgedViews(views, ms=ms)
    embeddings = None
    judged = known is None or len(views.pixels) > 1
    if known is None:
        output = guard.runner.infer(views.pixels[0][None], embeddings=guard.runner.gives_embeddings and share)
        known, embeddings = output.probs[0], None if output.embeddings is None else output.embeddings[0]
    probs = [known]
    for start in range(1, len(views.pixels), guard.batch):
        probs += list(guard.runner.infer(np.stack(views.pixels[start : start + guard.batch])).probs)
    if judged:
        ms["guard"] = (time.perf_counter() - decoded) * 1000
    return JudgedViews(views, tuple(probs), embeddings, ms)


def _views(source: ImageSource, where: str, max_pixels: int) -> Iterator[View]:
    if isinstance(source, Image.Image):
        return to_views(source, where=where)
    if not isinstance(source, (str, os.PathLike, bytes)):
        raise ImageFileError(f"an image is a file's name, its bytes or an opened image, not {type(source).__name__}")
    return open_views(source if isinstance(source, bytes) else Path(source), max_pixels=max_pixels)
