"""What a guard file says of labelled images, and what judging them in tiles, too, costs.

Shapes: n images that can be read, C classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calibration.labelled.corruptions import Corruption
from calibration.labelled.labels import LabelledImage, Labels
from calibration.labelled.risk_control import Bands, Promise, Seen, fit_bands, measure
from runtimes.guard.runner import GuardRunner
from runtimes.guard.verdict import harms, unsafe_probability
from runtimes.images.tiling import judged_pixels
from safevlm.contract.class_names import safe_index
from safevlm.contract.manifest_fields import ViewMode
from safevlm.errors import ImageFileError, InputError
from safevlm.images.image import open_image

__all__ = ["NAMES_SHOWN", "JudgedImages", "TileCost", "judge_images", "scores_of", "tile_cost"]

UNREADABLE_SHARE = 0.01
NAMES_SHOWN = 5
BATCH = 16


@dataclass(frozen=True, kw_only=True)
class TileCost:
    """What tiles cost on the images that thresholds were fitted on, beside the whole alone with a band of its own."""

    tiled: int
    """Images that were judged in tiles, too."""
    fpr: float
    """Safe images blocked."""
    fpr_whole: float
    unsure: float
    """Images that are neither blocked nor allowed."""
    unsure_whole: float
    fpr_limits_of_whole: float
    """Safe images blocked in tiles within the limits fitted for the whole: by a bundle that was not fitted again."""


@dataclass(frozen=True, kw_only=True)
class JudgedImages:
    """What a file says of the n images that can be read: probabilities n x C, and their true classes.

    ``probs`` are of the worst of an image and its tiles, ``whole`` of the image alone; ``tiled`` images have tiles.
    """

    probs: NDArray[np.float32]
    whole: NDArray[np.float32]
    tiled: int
    truth: NDArray[np.int64]
    unreadable: tuple[str, ...]


def judge_images(
    runner: GuardRunner,
    classes: Sequence[str],
    labels: Labels,
    images: Iterable[LabelledImage],
    view: ViewMode,
    corruption: Corruption | None = None,
) -> JudgedImages:
    """Judge the images, under a corruption if one is given; InputError when more than 1 % of them cannot be read."""
    rgb: list[NDArray[np.uint8]] = []
    probs: list[NDArray[np.float32]] = []
    counts, truth, unreadable = [], [], []
    for image in images:
        before = len(rgb)
        try:
            opened = open_image(image.path)
            shown = opened if corruption is None else corruption(opened)
            rgb += [pixels for _, pixels in judged_pixels(shown, runner.preprocessing, view)]
        except ImageFileError:
            unreadable.append(str(image.path))
            _check_readable(unreadable, len(labels.images))
            continue
        truth.append(image.label)
        counts.append(len(rgb) - before)
        while len(rgb) >= BATCH:
            probs.append(runner.infer(np.stack(rgb[:BATCH])).probs)
            del rgb[:BATCH]
    if rgb:
        probs.append(runner.infer(np.stack(rgb)).probs)
    if not probs:
        raise InputError(
            "no image is left to fit thresholds on, because the labels of every image contradict each other. Correct "
            "the labels."
        )
    rows = np.concatenate(probs)
    ends = np.cumsum(counts)
    safe = safe_index(classes)
    worst = [end - count + int(rows[end - count : end, safe].argmin()) for end, count in zip(ends, counts, strict=True)]
    return JudgedImages(
        probs=rows[worst],
        whole=rows[ends - counts],
        tiled=sum(count > 1 for count in counts),
        truth=np.array(truth),
        unreadable=tuple(unreadable),
    )


def tile_cost(
    answers: JudgedImages,
    under: Sequence[JudgedImages],
    bands: Bands,
    promise: Promise,
    classes: Sequence[str],
) -> TileCost:
    """Return what tiles cost; ``bands`` were fitted on the scores and harms of the worst of each image's tiles."""
    unsafe = answers.truth != safe_index(classes)
    scores, harms = scores_of(answers.probs, classes)
    alone, harms_alone = scores_of(answers.whole, classes)
    alone_under = [scores_of(each.whole, classes) for each in under]
    of_whole = fit_bands(alone, unsafe, harms_alone, promise, per_class=False, under=alone_under)
    tiles, whole = measure(bands, scores, unsafe, harms), measure(of_whole, alone, unsafe, harms_alone)
    return TileCost(
        tiled=answers.tiled,
        fpr=tiles.fpr,
        fpr_whole=whole.fpr,
        unsure=tiles.unsure,
        unsure_whole=whole.unsure,
        fpr_limits_of_whole=measure(of_whole, scores, unsafe, harms).fpr,
    )


def _check_readable(unreadable: Sequence[str], n: int) -> None:
    if len(unreadable) > UNREADABLE_SHARE * n:
        raise InputError(
            f"{len(unreadable)} of {n} images cannot be read ({', '.join(unreadable[:NAMES_SHOWN])}), and perhaps "
            "more. At most 1 % is skipped. Repair or remove them."
        )


def scores_of(probs: NDArray[np.float32], classes: Sequence[str]) -> Seen:
    """Return p(unsafe) and the most probable harm of each row, as judging computes them."""
    safe = safe_index(classes)
    return Seen(unsafe_probability(probs, safe), [classes[at] for at in harms(probs, safe)])
