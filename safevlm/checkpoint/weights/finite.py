"""NaN and infinity: stored in a checkpoint, or made by a dtype that ends earlier."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from safevlm.errors import CheckpointError, PrecisionError

if TYPE_CHECKING:
    from safevlm.checkpoint.weights.tensors import TensorStore

__all__ = ["check_finite", "check_values", "converted", "is_finite", "largest"]


def is_finite(values: Tensor) -> bool:
    """Say whether no value is NaN or infinite; whole numbers never are. No copy is made."""
    if not values.is_floating_point() or not values.numel():
        return True
    low, high = torch.aminmax(values)
    return bool(torch.isfinite(low)) and bool(torch.isfinite(high))


def largest(values: Tensor) -> float:
    """Return the largest magnitude of finite values; 0.0 of none."""
    if not values.numel():
        return 0.0
    low, high = torch.aminmax(values)
    return max(-float(low), float(high))


def check_finite(values: Tensor, name: str) -> None:
    """Raise CheckpointError that names the tensor and counts what is wrong, unless all its values are finite."""
    if is_finite(values):
        return
    nan, infinite = int(torch.isnan(values).sum()), int(torch.isinf(values).sum())
    raise CheckpointError(
        f"tensor '{name}' holds {nan:,} NaN and {infinite:,} infinite values among {values.numel():,}, so it cannot "
        "be used. Fetch the file again; if it was published like this, ask its authors."
    )


def converted(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Return a checkpoint's tensor in a dtype.

    Raises: CheckpointError for values that are not finite, or whole numbers, which a quantized weight without its
    scales is; PrecisionError for values that the dtype cannot hold.
    """
    if not values.is_floating_point():
        raise CheckpointError(
            f"tensor '{name}' holds integers ({str(values.dtype).removeprefix('torch.')}) like a quantized weight, "
            "but has no scale. Give the checkpoint in 16 bit."
        )
    found = values.to(dtype)
    if not is_finite(found):
        check_finite(values, name)
        problem = f"tensor '{name}' holds {largest(values):.4g}, beyond {_maximum(dtype)}."
        advice = " Fetch the file again; if it was published like this, ask its authors."
        raise PrecisionError(problem + (advice if dtype == torch.float32 else ""))
    return found


def check_values(
    tensors: TensorStore, dtype_of: Callable[[str], torch.dtype | None], report: Callable[[str], None] = lambda _: None
) -> None:
    """Read every tensor once, in pieces; refuse what is not finite, or not in the dtype that ``dtype_of`` gives.

    Raises: those of :func:`converted`, before hours of work instead of after.
    """
    names = tensors.names()
    for number, name in enumerate(names, 1):
        if number % 100 == 1:
            report(f"checking for NaN and infinity, tensor {number} of {len(names)}")
        stored, dtype, high = tensors.stored_name(name), dtype_of(name), 0.0
        for values in tensors.pieces(name):
            if not is_finite(values):
                check_finite(tensors.read(name), stored)
            high = max(high, largest(values) if values.is_floating_point() else 0.0)
        if dtype is not None and high > torch.finfo(dtype).max:
            raise PrecisionError(f"tensor '{stored}' holds {high:.4g}, beyond {_maximum(dtype)}.")


def _maximum(dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')}'s maximum of {torch.finfo(dtype).max:,.4g}"
