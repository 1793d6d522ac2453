"""What a guard says of each view of an image, for the gate: one decode, one set of embeddings."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from runtimes.images.views import ImageSource, ImageViews, read_views
from safevlm.contract.preprocessing import Preprocessing

if TYPE_CHECKING:
    from runtimes.guard.judge import Guard

__all__ = ["JudgedViews", "judge_views"]


@dataclass(frozen=True, eq=False)
class JudgedViews:
    """An image as the guard judged it: a row of probabilities for each view, none without a guard."""

    views: ImageViews
    probs: tuple[npt.NDArray[np.float32], ...] = ()
    embeddings: npt.NDArray[np.float32] | None = None
    """Of the usual view."""
    ms: Mapping[str, float] = field(default_factory=dict)


def judge_views(
    source: ImageSource,
    guard: Guard | None,
    size: Preprocessing | None,
    *,
    share: bool,
    known: npt.NDArray[np.float32] | None = None,
) -> JudgedViews:
    """Decode an image once and judge it, if there is a guard and its verdict is not ``known``.

    ``known`` is of the usual view as a whole. ``size`` is the language model's, for images that only it judges: it is
    shown no more than that, so that there is nothing to see in tiles. ``share`` asks for embeddings. Raises
    ImageFileError, and what the guard raises.
    """
    begun = time.perf_counter()
    if guard is None:
        views = read_views(source, size, "the given image")
    else:
        views = read_views(source, guard.runner.preprocessing, "the given image", mode=guard.view)
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
