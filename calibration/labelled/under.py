"""The promise on misses under corruptions: whether it can be made at all, the passes that it needs, what came of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from calibration.labelled.corruptions import Corruption
from calibration.labelled.judged_images import JudgedImages, judge_images
from calibration.labelled.labels import LabelledImage, Labels
from calibration.labelled.risk_control import Bands, Promise, Seen, check_feasible, fewest, measure
from runtimes.guard.runner import GuardRunner
from safevlm.contract.class_names import safe_index
from safevlm.contract.manifest_fields import ViewMode
from safevlm.contract.under import UnderCorruption
from safevlm.errors import InputError

__all__ = ["Watch", "check_labels", "judge_under", "rates_under"]

Watch = Callable[[Sequence[LabelledImage], str], Iterator[LabelledImage]]
"""Passes images through, told what they are judged for."""


def check_labels(labels: Labels, classes: Sequence[str], promise: Promise, under: Sequence[Corruption]) -> None:
    """Raise InputError before any image is judged where there are too few for the promise, whatever the guard says.

    A corruption changes no label, so their number is the same under each.
    """
    unsafe = sum(image.label != safe_index(classes) for image in labels.images)
    try:
        check_feasible(unsafe, len(labels.images) - unsafe, promise)
    except InputError as error:
        if not under or unsafe >= fewest(promise.alpha, promise):
            raise  # what safe images lack has nothing to do with corruptions
        raise InputError(f"No promise can be kept under {', '.join(map(str, under))}: {error}") from error


def judge_under(
    runner: GuardRunner,
    path: str,
    classes: Sequence[str],
    labels: Labels,
    view: ViewMode,
    under: Sequence[Corruption],
    watch: Watch,
) -> tuple[JudgedImages, tuple[JudgedImages, ...]]:
    """Judge the images by the file at ``path``, as they are and under each corruption: the same images in each pass.

    Raises InputError as ``judge_images`` does, and where an image can be judged in one pass and not in another.
    """
    plain = judge_images(runner, classes, labels, watch(labels.images, path), view)
    found = []
    for each in under:
        answers = judge_images(runner, classes, labels, watch(labels.images, f"{path} {each}"), view, each)
        if answers.unreadable != plain.unreadable:
            changed = sorted(set(answers.unreadable) ^ set(plain.unreadable))
            raise InputError(
                f"{changed[0]} can be judged either as it is or under {each}, but not both. Remove the image, and "
                "change no file meanwhile."
            )
        found.append(answers)
    return plain, tuple(found)


def rates_under(
    bands: Bands, unsafe: NDArray[np.bool_], under: Sequence[Corruption], seen: Sequence[Seen]
) -> tuple[UnderCorruption, ...]:
    """Return what bands do to the images under each corruption."""
    found = [measure(bands, each.scores, unsafe, each.harms) for each in seen]
    return tuple(
        UnderCorruption(corruption=str(each), miss_rate=rates.miss, fpr=rates.fpr, unsure_rate=rates.unsure)
        for each, rates in zip(under, found, strict=True)
    )
