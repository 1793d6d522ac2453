"""Why a guard does not go to float16: the tensor that it cannot hold, or the module whose output it cannot.

Float16 ends at 65,504, bfloat16 and float32 at 3.4e38, and checkpoints are trained in those. Weights are looked at as
they are, and what every module of the torch path gives is looked at while it runs. Where the float16 file fails its
parity check all the same, the torch path runs once more with every module's output rounded to float16: if that fails,
too, the numbers are the checkpoint's; if not, the fault is the export's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from export.guard.graph import PRECISIONS, Precision
from export.guard.left_out import LeftOut
from export.guard.trunks import trunk_of
from safevlm.checkpoint.checkpoint import Checkpoint
from safevlm.checkpoint.weights.finite import is_finite, largest
from safevlm.contract.parity import TOLERANCES
from safevlm.errors import CheckpointError
from safevlm.network.reference import MODEL_PREFIX, GuardModel, VisionPath

__all__ = ["Seen", "check_reference", "fitting", "half_fault", "output_beyond_half", "watched", "weight_beyond_half"]

FLOAT16_MAX = float(torch.finfo(torch.float16).max)


def fitting(
    checkpoint: Checkpoint,
    model: GuardModel | VisionPath,
    seen: Seen,
    asked: Iterable[Precision],
    left_out: LeftOut,
    *,
    embeddings: bool,
) -> list[Precision]:
    """Return the precisions that numbers fit, in the order to export them in: fp16 halves weights in their place.

    ``model`` must not have been exported yet; ``seen`` is what its modules gave in float32. A runtime may keep a value
    in float32 that the file has in float16, as ONNX Runtime does on CPUs, so none is asked here.

    Raises: PrecisionError when none of those ``asked`` for is left.
    """
    wanted = sorted(asked, key=PRECISIONS.index)
    if "fp16" in wanted:
        reason = weight_beyond_half(checkpoint, model, embeddings=embeddings)
        reason = reason or output_beyond_half(checkpoint, model, seen, embeddings=embeddings)
        if reason is not None:
            left_out.add("fp16", reason)
            wanted.remove("fp16")
    return wanted


def output_beyond_half(
    checkpoint: Checkpoint, model: GuardModel | VisionPath, seen: Seen, *, embeddings: bool
) -> str | None:
    """Return which module first gave what float16 cannot hold; ``None`` where none did that runs in float16."""
    modules = dict(_half_modules(checkpoint, model, embeddings))
    name = next((name for name, size in seen.sizes.items() if name in modules and size > FLOAT16_MAX), None)
    if name is None:
        return None
    module = _stored_module(checkpoint, name)
    return f"the output of '{module}' reaches {seen.sizes[name]:,.6g}, beyond float16's maximum of {FLOAT16_MAX:,.0f}"


def weight_beyond_half(checkpoint: Checkpoint, model: GuardModel | VisionPath, *, embeddings: bool) -> str | None:
    """Return what is wrong with the first tensor that float16 cannot hold; ``None`` where it holds all that are used.

    ``model`` must not have been exported yet, which rearranges its weights; with ``embeddings`` they are an output.
    """
    vision = _vision(model)
    trunk = trunk_of(vision, checkpoint.family.key)
    folded = [] if _keeps_last(model, embeddings) else [*trunk.last.parameters()]
    used = {each.data_ptr() for each in trunk.parameters()} - {each.data_ptr() for each in folded}
    for name, parameter in vision.core.named_parameters():
        if parameter.data_ptr() in used and largest(parameter) > FLOAT16_MAX:
            return _too_large(checkpoint.tensors.stored_name(MODEL_PREFIX + name), parameter)
    for name, parameter in trunk.named_parameters():  # what a trunk makes of weights: Qwen's two frames are one kernel
        if parameter.data_ptr() in used and largest(parameter) > FLOAT16_MAX:
            return _too_large(name, parameter)
    return None


def check_reference(
    checkpoint: Checkpoint, seen: Seen, answers: Mapping[str, NDArray[np.float32]], images: int
) -> None:
    """Raise CheckpointError, naming the module, where the torch path's own ``answers`` to images are not finite."""
    finite = [np.isfinite(values.reshape(images, -1)).all(axis=1) for values in answers.values()]
    wrong = images - int(np.logical_and.reduce(finite).sum())
    if wrong:
        where = f"'{_stored_module(checkpoint, seen.broken)}'" if seen.broken else "the guard head"
        raise CheckpointError(
            f"{checkpoint.name}: {where} gives NaN or infinity in float32, for {wrong} of {images} images. Nothing was "
            "exported. Fetch the checkpoint again; if it was published like this, ask its authors."
        )


def half_fault(
    checkpoint: Checkpoint, model: GuardModel | VisionPath, rgb: NDArray[np.uint8], *, embeddings: bool
) -> str | None:
    """Return why float16 fails on images, or ``None`` where it should not, and the export is at fault.

    ``model`` is a fresh one, and its vision path's weights are rounded.
    """
    modules = _half_modules(checkpoint, model, embeddings)
    expected = [_run(model, rgb, number) for number in range(len(rgb))]
    for _, module in modules:
        for parameter in module.parameters():
            parameter.data = parameter.data.half().to(parameter.dtype)
    for number, right in enumerate(expected):
        with watched(modules, half=True) as seen:
            found = _run(model, rgb, number)
        if seen.broken:
            broken = _stored_module(checkpoint, seen.broken)
            return f"the output of '{broken}' leaves float16's range on image {number + 1}"
        coarse = _coarse(right, found, embeddings=embeddings or isinstance(model, VisionPath))
        if coarse:
            return f"rounding to float16 alone {coarse} on image {number + 1}"
    return None


@dataclass
class Seen:
    """What a run's modules gave: the largest magnitudes by name, and the first module whose output is not finite."""

    sizes: dict[str, float] = field(default_factory=dict)
    broken: str = ""


@contextmanager
def watched(modules: Iterable[tuple[str, nn.Module]], *, half: bool = False) -> Iterator[Seen]:
    """Look at what named modules give, in the order in which they give it; with ``half`` it is rounded to float16."""
    seen = Seen()

    def watch(name: str) -> Callable[..., Any]:
        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            values = output[0] if isinstance(output, tuple) else output
            if not isinstance(values, Tensor) or not values.is_floating_point():
                return None
            if half:
                values = values.half().to(values.dtype)
            seen.sizes[name] = max(largest(values), seen.sizes.get(name, 0.0))
            if not seen.broken and not is_finite(values):
                seen.broken = name
            return (values, *output[1:]) if isinstance(output, tuple) else values

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in modules if name]
    try:
        yield seen
    finally:
        for each in hooks:
            each.remove()


def _run(model: GuardModel | VisionPath, rgb: NDArray[np.uint8], number: int) -> tuple[Tensor, Tensor | None]:
    """Return image embeddings and, of a guard, probabilities for one image."""
    image = torch.from_numpy(rgb[number : number + 1])
    with torch.inference_mode():
        features = _vision(model)(image)
        return features, model.answer(features)[0] if isinstance(model, GuardModel) else None


def _coarse(right: tuple[Tensor, Tensor | None], found: tuple[Tensor, Tensor | None], *, embeddings: bool) -> str:
    """Return how far float16 is off where that is more than its files may be; an empty text where it is not."""
    tolerance = TOLERANCES["fp16"]
    if embeddings:
        change = float((found[0] - right[0]).abs().max()) / max(largest(right[0]), torch.finfo(torch.float32).tiny)
        if not change <= tolerance.embedding:
            return f"changes image embeddings by {change:.2g} of their largest value"
    if right[1] is not None and found[1] is not None:
        change = float((found[1] - right[1]).abs().max())
        if not change <= tolerance.probability:
            return f"changes probabilities by {change:.2g}"
    return ""


def _vision(model: GuardModel | VisionPath) -> VisionPath:
    return model.vision if isinstance(model, GuardModel) else model


def _half_modules(
    checkpoint: Checkpoint, model: GuardModel | VisionPath, embeddings: bool
) -> list[tuple[str, nn.Module]]:
    """Return the modules of the vision path that a float16 file computes in float16, by name."""
    vision = _vision(model)
    trunk = trunk_of(vision, checkpoint.family.key)
    own = {id(module) for module in trunk.modules()}
    last = {each.data_ptr() for each in trunk.last.parameters()} if _keeps_last(model, embeddings) else set()
    return [
        (name, module)
        for name, module in vision.core.named_modules()
        if id(module) in own or not last.isdisjoint(each.data_ptr() for each in module.parameters(recurse=False))
    ]


def _keeps_last(model: GuardModel | VisionPath, embeddings: bool) -> bool:
    """Say whether the projector's last map is in the trunk, and not folded into the head, which stays in float32."""
    return embeddings or isinstance(model, VisionPath) or model.pooling != "mean"


def _too_large(name: str, parameter: Tensor) -> str:
    return f"tensor '{name}' holds {largest(parameter):,.6g}, beyond float16's maximum of {FLOAT16_MAX:,.0f}"


def _stored_module(checkpoint: Checkpoint, name: str) -> str:
    """Return a module's path as the checkpoint has it; of one without tensors the path that transformers uses."""
    below = MODEL_PREFIX + name + "."
    tensor = next((each for each in checkpoint.tensors.names() if each.startswith(below)), None)
    if tensor is None:
        return MODEL_PREFIX + name
    return checkpoint.tensors.stored_name(tensor).removesuffix(tensor.removeprefix(below)).rstrip(".")
