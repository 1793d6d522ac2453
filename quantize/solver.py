"""GPTQ: rounding a linear's weights column by column, each column making up for the errors before it.

Shapes: R output rows, C input columns, G groups of columns.

The method is that of Frantar et al. 2023 (https://arxiv.org/abs/2210.17323): the same columns in the same order with
the same results, computed without the inverse of H. With H = U Uᵀ, U upper triangular, the cost of the errors e of a
row is the squared length of e U; its k-th entry is U[k, k] times (target[k] - q[k]), where the target is the weight
plus what the columns before leave to be made up for. One Cholesky factorisation then does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from models.errors import InputError
from quantize.grid import Grid, Scheme, dequantize, fit_grid, groups_of, round_to_grid

__all__ = ["ActOrder", "SolveOptions", "Solved", "solve"]

ActOrder = Literal["none", "group", "static"]
DAMP_GROWTH, DAMP_LIMIT = 10.0, 1e3
INNER = 32
"""Columns that are made up for one by one before a matrix product takes them together."""


@dataclass(frozen=True, kw_only=True)
class SolveOptions:
    """How columns are visited.

    ``act_order`` ``none``: as they stand; ``group``: by falling second moment, and groups are formed in that order
    (readers need ``g_idx``); ``static``: by falling second moment, groups and grids as they stand. ``damp`` is the
    share of H's mean diagonal that is added to it. ``search`` tries shrunk grids.
    """

    act_order: ActOrder = "static"
    damp: float = 0.01
    search: bool = True
    block: int = 128

    def __post_init__(self) -> None:
        if not 0 < self.damp < 1:
            raise InputError(f"--damp {self.damp}: a share above 0 and below 1 is allowed; 0.01 is usual.")


@dataclass(frozen=True, kw_only=True, eq=False)
class Solved:
    """A rounded linear: integers R × C (uint8), grid, each column's group, and what rounding costs.

    ``loss`` is tr((W - Q) H (W - Q)ᵀ); ``rtn_loss`` that of rounding every weight to the nearest on a grid of its
    full range. ``kept`` is ``rtn`` where that was the better one.
    """

    ints: Tensor
    grid: Grid
    group_of: Tensor
    loss: float
    rtn_loss: float
    kept: Literal["gptq", "rtn"]
    damp: float
    """What was needed for the factorisation; more than asked for where that failed."""
    dead_columns: int
    """Columns whose inputs are always zero; they are rounded to the nearest."""

    def weight(self) -> Tensor:
        """Return the weights that are stored, R × C."""
        return dequantize(self.ints, self.grid, self.group_of)


@torch.no_grad()
def solve(
    weights: Sequence[Tensor],
    hessian_CC: Tensor,
    scheme: Scheme,
    options: SolveOptions = SolveOptions(),
    *,
    name: str = "the linear",
) -> list[Solved]:
    """Round linears that share their inputs (each R × C), in the dtype of ``hessian_CC``.

    Rows do not know of each other, so the result is that of solving each linear alone; together they take one
    factorisation and one walk over the columns.

    Errors: InputError for a group size that does not divide C, or values that are not finite.
    """
    weight = torch.cat([each.to(hessian_CC) for each in weights])
    if not bool(torch.isfinite(weight.sum())) or not bool(torch.isfinite(hessian_CC.sum())):
        raise InputError(f"{name}: weights or activations hold NaN or infinity.")
    columns = scheme.columns(weight.shape[1], name)
    diagonal = hessian_CC.diagonal()
    dead = diagonal <= 0
    order = _order(diagonal, options.act_order)
    upper, damp = _factor(hessian_CC, dead, order, options.damp)
    # rounding to the nearest, as a measure and as a way out
    plain_groups = groups_of(weight.shape[1], columns, weight.device)
    plain = fit_grid(weight, scheme, columns)
    plain_ints = round_to_grid(weight, plain, scheme, plain_groups)
    error = weight - dequantize(plain_ints, plain, plain_groups)
    mean = damp * float(diagonal[~dead].mean()) if not bool(dead.all()) else 0.0
    alive = ~dead[order]
    plain_loss = _loss((error[:, order] @ upper).square(), error[:, order], alive, mean)
    ints, grid, group_of, residual = _walk(weight[:, order], upper, diagonal[order], order, scheme, options, columns)
    loss = _loss(residual, weight[:, order] - dequantize(ints, grid, group_of), alive, mean)
    back = torch.argsort(order)
    ints, group_of = ints[:, back], group_of[back]
    found, start = [], 0
    for each in weights:
        rows = slice(start, start + len(each))
        start += len(each)
        ours, rtn = float(loss[rows].sum()), float(plain_loss[rows].sum())
        better = ours <= rtn  # false for NaN, too
        chosen, where, groups = (ints, grid, group_of) if better else (plain_ints, plain, plain_groups)
        found.append(
            Solved(
                ints=chosen[rows].to(torch.uint8),
                grid=Grid(scale=where.scale[rows], zero=where.zero[rows]),
                group_of=groups,
                loss=ours if better else rtn,
                rtn_loss=rtn,
                kept="gptq" if better else "rtn",
                damp=damp,
                dead_columns=int(dead.sum()),
            )
        )
    return found


def _order(diagonal: Tensor, act_order: ActOrder) -> Tensor:
    if act_order == "none":
        return torch.arange(len(diagonal), device=diagonal.device)
    return torch.argsort(diagonal, descending=True, stable=True)


def _factor(hessian: Tensor, dead: Tensor, order: Tensor, damp: float) -> tuple[Tensor, float]:
    """Return upper triangular U with U Uᵀ = H + damping, columns in ``order``, and the damping that it took."""
    mean = float(hessian.diagonal()[~dead].mean()) if not bool(dead.all()) else 1.0
    flipped = order.flip(0)
    tried = hessian[flipped][:, flipped]
    places = dead[flipped]
    diagonal = torch.where(places, torch.full_like(tried.diagonal(), mean), tried.diagonal())
    while damp <= DAMP_LIMIT:
        tried.diagonal().copy_(diagonal + damp * mean)
        lower, failed = torch.linalg.cholesky_ex(tried)
        if not int(failed) and bool(torch.isfinite(lower.diagonal()).all()):
            return lower.flip(0, 1).contiguous(), damp
        damp *= DAMP_GROWTH
    raise InputError(
        "the second moments of a linear's inputs cannot be factorised, however much they are damped: activations are "
        "too large for float32. Check the checkpoint, or calibrate in float32."
    )


def _loss(squares_RC: Tensor, error_RC: Tensor, alive_C: Tensor, damping: float) -> Tensor:
    """Return each row's cost under H itself: what damping and dead columns added is taken off again."""
    damped = squares_RC[:, alive_C].sum(dim=1)
    return (damped - damping * error_RC[:, alive_C].square().sum(dim=1)).clamp(min=0)


def _walk(
    weight_RC: Tensor,
    upper_CC: Tensor,
    moments_C: Tensor,
    order_C: Tensor,
    scheme: Scheme,
    options: SolveOptions,
    columns: int,
) -> tuple[Tensor, Grid, Tensor, Tensor]:
    """Round columns in the order they are given.

    Returns integers R × C, grid, each column's group, and the squares of (W - Q) U, all in that order (the grid's
    groups are those of the model where grids are fitted beforehand).
    """
    rows, width = weight_RC.shape
    importance = moments_C if options.search else None
    fitted_before = options.act_order == "static" or columns == width
    if fitted_before:
        back = torch.argsort(order_C)
        straight = weight_RC[:, back]
        grid = fit_grid(straight, scheme, columns, None if importance is None else importance[back])
        group_of = (order_C // columns) if options.act_order == "static" else torch.zeros_like(order_C)
        scales, zeros = grid.scale, grid.zero
    else:
        group_of = groups_of(width, columns, weight_RC.device)
        scales = torch.empty(rows, width // columns, dtype=weight_RC.dtype, device=weight_RC.device)
        zeros = torch.empty_like(scales)
    block = options.block
    if not fitted_before:  # a group begins where a block begins
        block = max(size for size in range(1, block + 1) if columns % size == 0)
    weight = weight_RC.T.contiguous()  # a column of the weight is a row here: one run of memory
    errors = torch.empty_like(weight)
    ints = torch.empty_like(weight)
    squares = torch.empty_like(weight)
    for start in range(0, width, block):
        stop = min(start + block, width)
        owed = upper_CC[:start, start:stop].T @ errors[:start]
        if not fitted_before and start % columns == 0:
            end = start + columns
            ahead = owed if end == stop else upper_CC[:start, start:end].T @ errors[:start]
            moved = torch.linalg.solve_triangular(upper_CC[start:end, start:end].T, ahead, upper=False)
            fit = fit_grid(
                (weight[start:end] + moved).T,
                scheme,
                columns,
                None if importance is None else importance[start:end],
            )
            scales[:, start // columns], zeros[:, start // columns] = fit.scale[:, 0], fit.zero[:, 0]
        _walk_block(
            slice(start, stop), owed, weight, upper_CC, scales[:, group_of[start:stop]].T.contiguous(),
            zeros[:, group_of[start:stop]].T.contiguous(), scheme.largest, errors, ints, squares,
        )  # fmt: skip
    return ints.T, Grid(scale=scales, zero=zeros), group_of, squares.T


def _walk_block(
    block: slice,
    owed_BR: Tensor,
    weight_CR: Tensor,
    upper_CC: Tensor,
    scale_BR: Tensor,
    zero_BR: Tensor,
    largest: int,
    errors_CR: Tensor,
    ints_CR: Tensor,
    squares_CR: Tensor,
) -> None:
    """Round a block's columns; ``owed_BR`` is what the errors before the block make of (W - Q) U in it."""
    first, width = block.start, block.stop - block.start
    own = upper_CC[block, block]
    pivots = own.diagonal().tolist()
    for inner in range(0, width, INNER):
        end = min(inner + INNER, width)
        for k in range(inner, end):
            original, scale, zero = weight_CR[first + k], scale_BR[k], zero_BR[k]
            target = torch.add(original, owed_BR[k], alpha=1 / pivots[k])
            rounded = torch.div(target, scale).round_().add_(zero).clamp_(0, largest)
            ints_CR[first + k] = rounded
            stored = rounded.sub_(zero).mul_(scale)
            torch.sub(original, stored, out=errors_CR[first + k])
            torch.mul(target.sub_(stored), pivots[k], out=squares_CR[first + k])
            if k + 1 < end:
                owed_BR[k + 1 : end].addr_(own[k, k + 1 : end], errors_CR[first + k])
        if end < width:
            owed_BR[end:].addmm_(own[inner:end, end:].T, errors_CR[first + inner : first + end])
    squares_CR[block].square_()
