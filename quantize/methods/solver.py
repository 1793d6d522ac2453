"""GPTQ: rounding a linear's weights column by column, each column making up for the errors before it.

Shapes: R output rows, C input columns, G groups of columns.

The method is that of Frantar et al. 2023 (https://arxiv.org/abs/2210.17323): the same columns in the same order with
the same results, computed without the inverse of H. With H = U Uᵀ, U upper triangular, the cost of the errors e of a
row is the squared length of e U; its k-th entry is U[k, k] times (target[k] - q[k]), where the target is the weight
plus what the columns before leave to be made up for. One Cholesky factorisation then does. Turned end for end, U is
a lower triangular L, which is what the factorisation gives: columns lie in reverse order here, the first to be
visited last.

Sweeps over scales and integers follow (:mod:`quantize.methods.sweeps`). They keep the damping, which is what stands for
inputs that calibration has not seen: without it the calibration tokens' error falls further and that of others rises.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from quantize.methods.beams import best_of_block
from quantize.methods.grid import Grid, Scheme, dequantize, fit_grid, groups_of
from quantize.methods.moments import INNER, Moments
from quantize.methods.sweeps import Standing, sweep
from safevlm.errors import InputError

__all__ = ["ActOrder", "SolveOptions", "Solved", "rows_together", "solve"]

ActOrder = Literal["none", "group", "static"]
TOGETHER, TOGETHER_ON_GPU = 2**23, 2**27
"""Weights that are rounded together. A GPU takes as long to start an operation as to round thousands of rows, and each
column takes a dozen of them, however many rows there are."""
EXACTLY = 2048
"""Up to this width the cost of rounding to the nearest is computed; above, it is estimated unless that is close."""
SURELY = 0.9
"""An estimate that is larger than the walk's cost by this factor settles which is better."""


@dataclass(frozen=True, kw_only=True)
class SolveOptions:
    """How columns are visited, and what is done once they are rounded.

    ``act_order`` ``none``: as they stand; ``group``: by falling second moment, and groups are formed in that order
    (readers need ``g_idx``); ``static``: by falling second moment, groups and grids as they stand. ``damp`` is the
    share of H's mean diagonal that is added to it. ``search`` tries shrunk grids. ``sweeps`` is how often scales and
    integers are gone over afterwards. ``beams`` is how many partial roundings of a row are kept within a block.
    ``mismatch``, between 0 and 1, says how far weights are moved before, to give what they give in the 16-bit model
    (:mod:`quantize.methods.mismatch`).
    """

    act_order: ActOrder = "static"
    damp: float = 0.2
    search: bool = True
    sweeps: int = 2
    beams: int = 1
    mismatch: float = 0.0
    block: int = 128

    def __post_init__(self) -> None:
        if not 0 < self.damp < 1:
            raise InputError(f"--damp {self.damp} is not allowed. Give a number above 0 and below 1; 0.2 is usual.")
        if self.sweeps < 0:
            raise InputError(f"--sweeps {self.sweeps} is not allowed. Give 0 for none, or more; 2 is usual.")
        if self.beams < 1:
            raise InputError(f"--beams {self.beams} is not allowed. Give at least 1; 1 keeps one rounding of a row.")
        if not 0 <= self.mismatch <= 1:
            raise InputError(f"--mismatch {self.mismatch:g} is not allowed. Give a share from 0 (off) to 1.")


@dataclass(frozen=True, kw_only=True, eq=False)
class Solved:
    """A rounded linear: integers R × C (uint8), grid, each column's group, and what rounding costs.

    ``loss`` is tr((W - Q) H (W - Q)ᵀ); ``rtn_loss`` that of rounding every weight to the nearest on a grid of its
    full range (estimated with 64 probes where it is far larger and C is above 2,048). ``kept`` is ``rtn`` where that
    was the better one. ``signal`` is tr(W H Wᵀ), estimated with 64 probes.
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
    products: torch.dtype | None = None,
    name: str = "the linear",
) -> list[Solved]:
    """Round linears that share their inputs (each R × C), in the dtype of ``hessian_CC``.

    Rows do not know of each other, so the result is that of solving each linear alone; together they take one
    factorisation and one walk over the columns. The work is done in the memory of ``hessian_CC``, which is as it
    was in the end. ``products`` is what factors of the sweeps' products are rounded to (by default they are not).

    Raises InputError for a group size that does not divide C, or values that are not finite.
    """
    width = weights[0].shape[1]
    columns = scheme.columns(width, name)
    if not all(bool(torch.isfinite(each.sum())) for each in (*weights, hessian_CC)):
        raise InputError(f"{name}: weights or activations hold NaN or infinity.")
    moments = Moments(hessian_CC)
    moments.factorise(options.damp, _order(moments.diagonal, options.act_order).flip(0))
    exactly = width <= EXACTLY
    probes = moments.probes()
    ours, plain, signals = [], [], []
    for rows in _chunks(weights, moments.diagonal):
        signals.append((rows @ probes).square().mean(dim=1))
        plain.append(_to_the_nearest(rows, moments, scheme, columns, None if exactly else probes).loss)
        ours.append(_walked(rows, moments, scheme, options, columns))
    if options.sweeps:
        moments.arrange(torch.argsort(ours[0].group_of, stable=True))
        moments.damp_diagonal()
        for number, rows in enumerate(_chunks(weights, moments.diagonal)):
            ours[number] = _swept(rows, ours[number], moments, scheme, options.sweeps, products)
    moments.restore()
    whole, signal, cost_to_nearest = _joined(ours), torch.cat(signals), torch.cat(plain)
    ours.clear()
    found, start = [], 0
    for weight in weights:
        mine = whole.cut(slice(start, start + len(weight)))
        rtn_loss = float(cost_to_nearest[start : start + len(weight)].sum())
        start += len(weight)
        loss, chosen = float(mine.loss.sum()), mine
        if not loss < (1.0 if exactly else SURELY) * rtn_loss:  # false for NaN, too
            chunks = _chunks([weight], moments.diagonal)
            nearest = _joined([_to_the_nearest(rows, moments, scheme, columns) for rows in chunks])
            rtn_loss = float(nearest.loss.sum())
            chosen = mine if loss <= rtn_loss else nearest
        found.append(
            Solved(
                ints=chosen.ints,
                grid=chosen.grid,
                group_of=chosen.group_of,
                loss=loss if chosen is mine else rtn_loss,
                rtn_loss=rtn_loss,
                signal=float(signal[start - len(weight) : start].sum()),
                kept="gptq" if chosen is mine else "rtn",
                damp=moments.damp,
                dead_columns=int(moments.dead.sum()),
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

    def cut(self, rows: slice) -> _Rows:
        """Return some of the rows."""
        grid = Grid(scale=self.grid.scale[rows], zero=self.grid.zero[rows])
        return _Rows(ints=self.ints[rows], grid=grid, group_of=self.group_of, loss=self.loss[rows])


def rows_together(width: int, device: torch.device) -> int:
    """Return how many rows of so many columns are rounded together: enough for fast products, in bounded memory."""
    return max(256, (TOGETHER if device.type == "cpu" else TOGETHER_ON_GPU) // width)


def _chunks(weights: Sequence[Tensor], like: Tensor) -> Iterator[Tensor]:
    """Yield all rows in their order, so many at a time, those of small linears together."""
    waiting: list[Tensor] = []
    most = rows_together(weights[0].shape[1], like.device)
    for weight in weights:
        for start in range(0, len(weight), most):
            part = weight[start : start + most].to(like)
            if waiting and sum(map(len, waiting)) + len(part) > most:
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
    weight_RC: Tensor, moments: Moments, scheme: Scheme, columns: int, probes: Tensor | None = None
) -> _Rows:
    """Round every weight by itself: a measure, and a way out. With ``probes`` its cost is estimated."""
    rows, width = weight_RC.shape
    grid = fit_grid(weight_RC, scheme, columns)
    scale, zero = grid.scale.unsqueeze(-1), grid.zero.unsqueeze(-1)
    grouped = weight_RC.reshape(rows, -1, columns)
    ints = torch.div(grouped, scale).round_().add_(zero).clamp_(0, scheme.largest)
    error = grouped - (ints - zero).mul_(scale)
    ints, error = ints.to(torch.uint8).reshape(rows, width), error.reshape(rows, width)
    loss = moments.cost(error) if probes is None else (error @ probes).square_().mean(dim=1)
    return _Rows(ints=ints, grid=grid, group_of=groups_of(width, columns, weight_RC.device), loss=loss)


def _swept(
    weight_RC: Tensor,
    walked: _Rows,
    moments: Moments,
    scheme: Scheme,
    sweeps: int,
    products: torch.dtype | None,
) -> _Rows:
    """Return rows after so many sweeps with H damped; a row whose cost without damping rose stays as it was."""
    order, alive = moments.order, moments.alive
    standing = Standing.of(
        weight_RC.T[order], walked.ints.T[order], walked.grid.scale.T.contiguous(), walked.grid.zero.T.contiguous()
    )
    cost = sweep(standing, moments.matrix, scheme, sweeps, products)
    loss = (cost - moments.damping * standing.errors[alive].square().sum(dim=0)).clamp_(min=0)
    better = loss <= walked.loss
    standing.round_again(torch.nonzero(~alive).flatten(), scheme.largest)
    ints = standing.ints.to(torch.uint8)[torch.argsort(order)].T
    kept = better.unsqueeze(1)
    return replace(
        walked,
        ints=torch.where(kept, ints, walked.ints),
        grid=Grid(scale=torch.where(kept, standing.scale.T, walked.grid.scale), zero=walked.grid.zero),
        loss=torch.where(better, loss, walked.loss),
    )


def _order(diagonal: Tensor, act_order: ActOrder) -> Tensor:
    if act_order == "none":
        return torch.arange(len(diagonal), device=diagonal.device)
    return torch.argsort(diagonal, descending=True, stable=True)


def _walked(weight_RC: Tensor, moments: Moments, scheme: Scheme, options: SolveOptions, columns: int) -> _Rows:
    """Round columns; with several beams each row as they or as one has it, whichever costs less with H damped.

    The best partial rounding need not become the best one, so one alone is walked, too.
    """
    one, costs = _walk(weight_RC, moments, scheme, replace(options, beams=1), columns)
    if options.beams == 1:
        return one
    more, costs_of_more = _walk(weight_RC, moments, scheme, options, columns)
    better = costs_of_more < costs
    chosen = better.unsqueeze(1)
    return _Rows(
        ints=torch.where(chosen, more.ints, one.ints),
        grid=Grid(
            scale=torch.where(chosen, more.grid.scale, one.grid.scale),
            zero=torch.where(chosen, more.grid.zero, one.grid.zero),
        ),
        group_of=one.group_of,
        loss=torch.where(better, more.loss, one.loss),
    )


def _walk(
    weight_RC: Tensor, moments: Moments, scheme: Scheme, options: SolveOptions, columns: int
) -> tuple[_Rows, Tensor]:
    """Round columns from the last of the factor's order to its first; also return the costs with H damped, R."""
    rows, width = weight_RC.shape
    lower, order, alive = moments.matrix, moments.order, moments.alive
    importance = moments.diagonal if options.search else None
    fitted_before = options.act_order == "static" or columns == width
    if fitted_before:
        grid = fit_grid(weight_RC, scheme, columns, importance)
        group_of = (order // columns) if options.act_order == "static" else torch.zeros_like(order)
        scales, zeros = grid.scale, grid.zero
    else:
        group_of = groups_of(width, columns, weight_RC.device).flip(0)
        scales = torch.empty(rows, width // columns, dtype=weight_RC.dtype, device=weight_RC.device)
        zeros = torch.empty_like(scales)
    block = options.block
    if not fitted_before:  # a group begins where a block begins
        block = max(size for size in range(1, block + 1) if columns % size == 0)
    weight = weight_RC.T[order]  # a column of the weight is a row here: one run of memory
    errors = torch.empty_like(weight)
    ints = torch.empty(width, rows, dtype=torch.uint8, device=weight.device)
    loss = torch.zeros(rows, dtype=weight.dtype, device=weight.device)
    for stop in range(width, 0, -block):
        start = max(0, stop - block)
        owed = lower[stop:, start:stop].T @ errors[stop:]
        if not fitted_before and (width - stop) % columns == 0:
            first = stop - columns
            ahead = owed if first == start else lower[stop:, first:stop].T @ errors[stop:]
            moved = torch.linalg.solve_triangular(lower[first:stop, first:stop].T, ahead, upper=True)
            found = (weight[first:stop] + moved).flip(0).T
            counts = None if importance is None else importance[order[first:stop]].flip(0)
            fit, group = fit_grid(found, scheme, columns, counts), (width - stop) // columns
            scales[:, group], zeros[:, group] = fit.scale[:, 0], fit.zero[:, 0]
        groups = group_of[start:stop]
        grid_of_block, here = (scales.T[groups], zeros.T[groups]), slice(start, stop)
        if options.beams == 1:
            _walk_block(here, owed, weight, moments, grid_of_block, scheme.largest, errors, ints, loss)
            continue
        own, alive_here = lower[here, here], alive[here].tolist()
        errors[here], cost = best_of_block(
            weight[here], owed, own, alive_here, grid_of_block, scheme.largest, options.beams
        )
        stored = (weight[here] - errors[here]).div_(grid_of_block[0])
        ints[here] = stored.round_().add_(grid_of_block[1])
        loss += cost
    damped = loss.clone()
    loss -= moments.damping * errors[alive].square_().sum(dim=0)
    back = torch.argsort(order)
    rows_walked = _Rows(
        ints=ints[back].T.contiguous(),
        grid=Grid(scale=scales, zero=zeros),
        group_of=group_of[back],
        loss=loss.clamp_(min=0),
    )
    return rows_walked, damped


def _walk_block(
    block: slice,
    owed_BR: Tensor,
    weight_CR: Tensor,
    moments: Moments,
    grid_BR: tuple[Tensor, Tensor],
    largest: int,
    errors_CR: Tensor,
    ints_CR: Tensor,
    loss_R: Tensor,
) -> None:
    """Round a block's columns; ``owed_BR`` is what the errors behind the block make of (W - Q) L in it."""
    first, width = block.start, block.stop - block.start
    own = moments.matrix[block, block]
    pivots, alive = own.diagonal().tolist(), moments.alive[block].tolist()
    for inner in range(width, 0, -INNER):
        begin = max(0, inner - INNER)
        for k in range(inner - 1, begin - 1, -1):
            original, scale, zero = weight_CR[first + k], grid_BR[0][k], grid_BR[1][k]
            target = torch.add(original, owed_BR[k], alpha=1 / pivots[k])
            rounded = torch.div(target, scale).round_().add_(zero).clamp_(0, largest)
            ints_CR[first + k] = rounded
            stored = rounded.sub_(zero).mul_(scale)
            torch.sub(original, stored, out=errors_CR[first + k])
            if alive[k]:
                short = target.sub_(stored)
                loss_R.addcmul_(short, short, value=pivots[k] ** 2)
            if k > begin:
                owed_BR[begin:k].addr_(own[k, begin:k], errors_CR[first + k])
        if begin:
            owed_BR[:begin].addmm_(own[begin:inner, :begin].T, errors_CR[first + begin : first + inner])
