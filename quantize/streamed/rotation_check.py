"""What is checked of a rotation before the first layer is rounded: that numbers fit, and that the guard is the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from calibration.sets.conversations import Sample
from quantize.methods.rotation import Rotate
from quantize.methods.settings import Progress
from quantize.streamed.artifact import kept_dtype
from quantize.streamed.drift import exact_probs
from quantize.streamed.rotated import SEED, RotatedTensors
from quantize.streamed.unfinished import Unfinished
from safevlm.checkpoint.checkpoint import Checkpoint
from safevlm.checkpoint.configs.processor_config import read_processor
from safevlm.checkpoint.weights.finite import converted
from safevlm.errors import InputError

__all__ = ["GUARD_TOLERANCE", "checked_rotation", "guard_difference"]

GUARD_TOLERANCE = 1e-5
"""How far a rotation may move a probability of the exact guard, in float32."""
IMAGES = 4
KEPT = "rotation.json"


def checked_rotation(
    source: Checkpoint,
    turned: Checkpoint,
    rotate: Rotate,
    samples: Sequence[Sample],
    unfinished: Unfinished,
    progress: Progress,
    *,
    grid: tuple[int, int] | None,
    max_bytes: int,
    device: str,
) -> dict[str, Any]:
    """Return what compression.json says of a rotation; a run that goes on keeps what was measured.

    Raises PrecisionError for turned tensors that 16 bit cannot hold; InputError where the guard moved.
    """
    if not isinstance(turned.tensors, RotatedTensors):
        return {"rotate": rotate}
    measured = unfinished.kept(KEPT)
    if measured is None:
        _check_range(turned, turned.tensors)
        measured = guard_difference(
            source, turned, samples, grid=grid, max_bytes=max_bytes, device=device, report=progress.status
        )
        unfinished.keep(KEPT, measured)
    progress.say(
        f"rotation ({rotate}): the exact guard's probabilities move by {measured['guard_difference']:.1g} at most"
    )
    return {"rotate": rotate, **measured}


def guard_difference(
    source: Checkpoint,
    turned: Checkpoint,
    samples: Sequence[Sample],
    *,
    grid: tuple[int, int] | None = None,
    max_bytes: int | None = None,
    device: str = "cpu",
    report: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Return how far the exact guard's probabilities moved on images of some samples, or on noise without any.

    Raises InputError where that is more than rounding in float32 explains.
    """
    preprocessing = read_processor(source.processor, family=source.family.key, grid=grid)
    chosen = [sample for sample in samples if sample.image is not None][:IMAGES]
    images = [image for sample in chosen if (image := sample.picture()) is not None]
    if images:
        rgb = torch.from_numpy(np.stack([preprocessing.apply(image) for image in images]))
    else:
        shape = (IMAGES, preprocessing.height, preprocessing.width, 3)
        rgb = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(SEED))
    report(f"comparing the guard before and after the rotation on {len(rgb)} images")
    before, after = (
        exact_probs(each, rgb, grid=grid, max_bytes=max_bytes, device=device, report=report)
        for each in (source, turned)
    )
    difference = float((before - after).abs().max())
    if not difference <= GUARD_TOLERANCE:
        raise InputError(
            f"--rotate moves a probability of {source.name}'s guard by {difference:.2g}; at most {GUARD_TOLERANCE:g} "
            "is allowed. Use --rotate none."
        )
    return {"guard_images": len(rgb), "guard_difference": difference}


def _check_range(turned: Checkpoint, tensors: RotatedTensors) -> None:
    """Raise PrecisionError for a turned tensor that is not rounded and is beyond the dtype that it is written in."""
    for name in tensors.turned_names():
        if not name.startswith(f"{turned.family.language_prefix}layers.") or not name.endswith("_proj.weight"):
            for part in tensors.pieces(name):
                converted(part, kept_dtype(turned, name), tensors.stored_name(name))
