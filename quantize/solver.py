"""GPTQ: rounding a linear's weights column by column, each column making up for the errors before it.

Shapes: R output rows, C input columns, G groups of columns.

The method is that of Frantar et al. 2023 (https://arxiv.org/abs/2210.17323): the same columns in the same order with
the same results, computed without the inverse of H. With H = U Uᵀ, U upper triangular, the cost of the errors e of a
row is the squared length of e U; its k-th entry is U[k, k] times (target[k] - q[k]), where the target is the weight
plus what the columns before leave to be made up for. One Cholesky factorisation then does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from models.errors import InputError
from quantize.grid import Grid, Scheme, dequantize, fit_grid, groups_of, round_to_grid

__all__ = ["ActOrder", "SolveOptions", "Solved", "solve"]

ActOrder = Literal["none", "group", "static"]
DAMP_GROWTH, DAMP_LIMIT = 10.0, 1e3
ROWS = 2048
"""Rows that are rounded together: enough for fast products, and a bound of the memory that they take."""
LOSS_BLOCK = 1024
PROBES = 64
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
    full range. ``kept`` is ``rtn`` where that was the better one. ``signal`` is tr(W H Wᵀ), estimated with 64 probes.
    """

    ints: Tensor
    grid: Grid
    group_of: Tensor
    loss: float
    rtn_loss: float
    signal: float
    kept: Literal["gptq", "rtn"]
    damp: float
    """What was needed for the factorisation; more than asked for where that failed."""
    dead_columns: int
    """Columns whose inputs are always zero; they are rounded to the nearest."""

    @property
    def relative_error(self) -> float:
        """Root mean square error of the outputs over their root mean square."""
        return float((self.loss / self.signal) ** 0.5) if self.signal > 0 else 0.0

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
    width = weights[0].shape[1]
    columns = scheme.columns(width, name)
    if not all(bool(torch.isfinite(each.sum())) for each in (*weights, hessian_CC)):
        raise InputError(f"{name}: weights or activations hold NaN or infinity.")
    diagonal = hessian_CC.diagonal().clone()
    dead = diagonal <= 0
    order = _order(diagonal, options.act_order)
    upper, damp = _factor(hessian_CC, dead, order, options.damp)
    damping = damp * float(diagonal[~dead].mean()) if not bool(dead.all()) else 0.0
    probes = upper @ _probes(width, upper)
    ours: list[_Rows] = []
    plain: list[_Rows] = []
    signals = []
    for rows in _chunks(weights, hessian_CC):
        signals.append((rows[:, order] @ probes).square().mean(dim=1))
        plain.append(_to_the_nearest(rows, upper, order, scheme, columns, ~dead[order], damping))
        ours.append(_walk(rows, upper, diagonal, order, scheme, options, columns, ~dead[order], damping))
    whole, nearest, signal = _joined(ours), _joined(plain), torch.cat(signals)
    found, start = [], 0
    for weight in weights:
        rows_of = slice(start, start + len(weight))
        start += len(weight)
        loss, rtn_loss = float(whole.loss[rows_of].sum()), float(nearest.loss[rows_of].sum())
        better = loss <= rtn_loss  # false for NaN, too
        chosen = whole if better else nearest
        found.append(
            Solved(
                ints=chosen.ints[rows_of],
                grid=Grid(scale=chosen.grid.scale[rows_of], zero=chosen.grid.zero[rows_of]),
                group_of=chosen.group_of,
                loss=loss if better else rtn_loss,
                rtn_loss=rtn_loss,
                signal=float(signal[rows_of].sum()),
                kept="gptq" if better else "rtn",
                damp=damp,
                dead_columns=int(dead.sum()),
            )
        )
    return found


@dataclass(frozen=True, kw_only=True, eq=False)
class _Rows:
    """Some rows' integers (uint8), grid and groups, columns in the model's order, and what each row costs."""

    ints: Tensor
    grid: Grid
    group_of: Tensor
    loss: Tensor


def _chunks(weights: Sequence[Tensor], like: Tensor) -> Iterator[Tensor]:
    """Yield all rows in their order, at most ``ROWS`` at a time, those of small linears together."""
    waiting: list[Tensor] = []
    for weight in weights:
        for start in range(0, len(weight), ROWS):
            part = weight[start : start + ROWS].to(like)
            if waiting and sum(map(len, waiting)) + len(part) > ROWS:
                yield torch.cat(waiting)
                waiting = []
            waiting.append(part)
    yield torch.cat(waiting)


def _joined(parts: Sequence[_Rows]) -> _Rows:
    return _Rows(
        ints=torch.cat([part.ints for part in parts]),
        grid=Grid(
            scale=torch.cat([part.grid.scale for part in parts]), zero=torch.cat([part.grid.zero for part in parts])
        ),
        group_of=parts[0].group_of,
        loss=torch.cat([part.loss for part in parts]),
    )


def _to_the_nearest(
    weight_RC: Tensor,
    upper_CC: Tensor,
    order_C: Tensor,
    scheme: Scheme,
    columns: int,
    alive_C: Tensor,
    damping: float,
) -> _Rows:
    """Round every weight by itself: a measure, and a way out."""
    group_of = groups_of(weight_RC.shape[1], columns, weight_RC.device)
    grid = fit_grid(weight_RC, scheme, columns)
    ints = round_to_grid(weight_RC, grid, scheme, group_of)
    error = (weight_RC - dequantize(ints, grid, group_of))[:, order_C]
    loss = -damping * error[:, alive_C].square().sum(dim=1)
    for start in range(0, error.shape[1], LOSS_BLOCK):  # below the diagonal there is nothing
        stop = min(start + LOSS_BLOCK, error.shape[1])
        part = error[:, :stop] @ upper_CC[:stop, start:stop]
        loss += part[:, alive_C[start:stop]].square_().sum(dim=1)
    return _Rows(ints=ints.to(torch.uint8), grid=grid, group_of=group_of, loss=loss.clamp(min=0))


def _probes(width: int, like: Tensor) -> Tensor:
    """Return the same signs each time, C × 64: their mean square under W U estimates tr(W H Wᵀ)."""
    signs = torch.randint(0, 2, (width, PROBES), generator=torch.Generator().manual_seed(0)) * 2 - 1
    return signs.to(like)


def _order(diagonal: Tensor, act_order: ActOrder) -> Tensor:
    if act_order == "none":
        return torch.arange(len(diagonal), device=diagonal.device)
    return torch.argsort(diagonal, descending=True, stable=True)


def _factor(hessian: Tensor, dead: Tensor, order: Tensor, damp: float) -> tuple[Tensor, float]:
    """Return upper triangular U with U Uᵀ = H + damping, columns in ``order``, and the damping that it took."""
    mean = float(hessian.diagonal()[~dead].mean()) if not bool(dead.all()) else 1.0
    flipped = order.flip(0)
    places = dead[flipped]
    while damp <= DAMP_LIMIT:
        tried = hessian[flipped][:, flipped]
        diagonal = torch.where(places, torch.full_like(tried.diagonal(), mean), tried.diagonal())
        tried.diagonal().copy_(diagonal + damp * mean)
        info = torch.empty((), dtype=torch.int32, device=hessian.device)
        torch.linalg.cholesky_ex(tried, out=(tried, info))
        if not int(info) and bool(torch.isfinite(tried.diagonal()).all()):
            return tried.flip(0, 1), damp
        damp *= DAMP_GROWTH
    raise InputError(
        "the second moments of a linear's inputs cannot be factorised, however much they are damped: activations are "
        "too large for float32. Check the checkpoint, or calibrate in float32."
    )


def _walk(
    weight_RC: Tensor,
    upper_CC: Tensor,
    diagonal_C: Tensor,
    order_C: Tensor,
    scheme: Scheme,
    options: SolveOptions,
    columns: int,
    alive_C: Tensor,
    damping: float,
) -> _Rows:
    """Round columns in ``order_C``; what damping and dead columns add to the cost is taken off again."""
    back = torch.argsort(order_C)
    moments_C = diagonal_C[order_C]
    rows, width = weight_RC.shape
    importance = moments_C if options.search else None
    fitted_before = options.act_order == "static" or columns == width
    if fitted_before:
        grid = fit_grid(weight_RC, scheme, columns, None if importance is None else importance[back])
        group_of = (order_C // columns) if options.act_order == "static" else torch.zeros_like(order_C)
        scales, zeros = grid.scale, grid.zero
    else:
        group_of = groups_of(width, columns, weight_RC.device)
        scales = torch.empty(rows, width // columns, dtype=weight_RC.dtype, device=weight_RC.device)
        zeros = torch.empty_like(scales)
    block = options.block
    if not fitted_before:  # a group begins where a block begins
        block = max(size for size in range(1, block + 1) if columns % size == 0)
    weight = weight_RC.T[order_C]  # a column of the weight is a row here: one run of memory
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
    loss = squares[alive_C].sum(dim=0) - damping * errors[alive_C].square().sum(dim=0)
    return _Rows(
        ints=ints.to(torch.uint8)[back].T.contiguous(),
        grid=Grid(scale=scales, zero=zeros),
        group_of=group_of[back],
        loss=loss.clamp(min=0),
    )


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
