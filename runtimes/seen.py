"""What a gate's guard sees of one image: its looks, and a row of probabilities for each."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from models.preprocessing import Preprocessing
from runtimes.judge import Guard
from runtimes.looks import ImageSource, Looks, look

__all__ = ["Seen", "see"]


@dataclass(frozen=True, eq=False)
class Seen:
    """An image as the guard saw it, a row for each of its looks; without a guard only these."""

    looks: Looks
    probs: tuple[npt.NDArray[np.float32], ...] = ()
    embeddings: npt.NDArray[np.float32] | None = None
    ms: Mapping[str, float] = field(default_factory=dict)


def see(
    image: ImageSource,
    guard: Guard | None,
    size: Preprocessing | None,
    *,
    share: bool,
    known: npt.NDArray[np.float32] | None = None,
) -> Seen:
    """Decode an image once and judge it, if there is a guard and its verdict is not ``known``.

    ``size`` is the language model's, for images that only it judges. Raises ImageFileError, and what the guard raises.
    """
    begun = time.perf_counter()
    looks = look(image, size if guard is None else guard.runner.preprocessing, "the given image")
    decoded = time.perf_counter()
    ms = {"decode": (decoded - begun) * 1000}
    if guard is None:
        return Seen(looks, ms=ms)
    embeddings = None
    judged = known is None or len(looks.pixels) > 1
    if known is None:
        output = guard.runner.infer(looks.pixels[0][None], embeddings=guard.runner.gives_embeddings and share)
        known, embeddings = output.probs[0], None if output.embeddings is None else output.embeddings[0]
    probs = [known]
    for start in range(1, len(looks.pixels), guard.batch):
        probs += list(guard.runner.infer(np.stack(looks.pixels[start : start + guard.batch])).probs)
    if judged:
        ms["guard"] = (time.perf_counter() - decoded) * 1000
    return Seen(looks, tuple(probs), embeddings, ms)
