"""The weight that a linear is rounded from where its inputs are no longer those of the 16-bit model.

A linear W reads y where it read x in the 16-bit model. Rounded from W it gives about W y, and what the layers before
did to y is passed on. The weight V that gives nearly W x instead has the least mean of

    share · |W x - V y|² + (1 - share) · |W y - V y|² + damping · |W - V|²

over the calibration tokens, which is V = W + share · W C (H + damping)⁻¹ with C the mean of (x - y) yᵀ and H that of
y yᵀ. With ``share`` 1 it is what GPTAQ (Li et al. 2025, https://arxiv.org/abs/2504.02692) makes up for column by
column, in one step. Rounding V under H is then rounding as ever.

Shapes: R output rows, C input columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantize.methods.moments import Moments

__all__ = ["Moved", "moved_weights"]

ROWS = 1024
"""Rows that are moved together, in bounded memory."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Moved:
    """A weight V, R × C float32, and how far it is from W: the root mean square of (V - W) y over that of W y."""

    weight: Tensor
    distance: float


@torch.no_grad()
def moved_weights(
    weights: Sequence[Tensor], hessian_CC: Tensor, cross_CC: Tensor, share: float, damp: float
) -> list[Moved]:
    """Move the weights (each R × C) of linears that share their inputs.

    ``damp`` is the damping as a share of H's mean diagonal. The work is done in the memory of ``hessian_CC``, which is
    as it was in the end. Raises InputError where no damping helps.
    """
    moments = Moments(hessian_CC)
    moments.factorise(damp, moments.order)
    lower, found = moments.matrix, []
    for weight in weights:
        moved = torch.empty(weight.shape, device=hessian_CC.device)
        for start in range(0, len(weight), ROWS):
            rows = slice(start, start + ROWS)
            part = weight[rows].to(moved) @ cross_CC
            part = torch.linalg.solve_triangular(lower.mT, part, upper=True, left=False)
            moved[rows] = torch.linalg.solve_triangular(lower, part, upper=False, left=False).mul_(share)
        found.append(moved)
    moments.restore()
    return [_added(weight, moved, moments) for weight, moved in zip(weights, found, strict=True)]


def _added(weight_RC: Tensor, move_RC: Tensor, moments: Moments) -> Moved:
    """Add a weight to what it is to be moved by, in that memory."""
    cost = size = 0.0
    for start in range(0, len(weight_RC), ROWS):
        rows = slice(start, start + ROWS)
        part = weight_RC[rows].to(move_RC)
        cost += float(moments.cost(move_RC[rows]).sum())
        size += float(moments.cost(part).sum())
        move_RC[rows] += part
    return Moved(weight=move_RC, distance=(cost / size) ** 0.5 if size > 0 else 0.0)
