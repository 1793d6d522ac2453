"""GPTQ: rounding a linear's weights column by column, each column making up for the errors before it.

Shapes: R output rows, C input columns, G groups of columns.

The method is that of Frantar et al. 2023 (https://arxiv.org/abs/2210.17323): the same columns in the same order with
the same results, computed without the inverse of H. With H = U Uᵀ, U upper triangular, the cost of the errors e of a
row is the squared length of e U; its k-th entry is U[k, k] times (target[k] - q[k]), where the target is the weight
plus what the columns before leave to be made up for. One Cholesky factorisation then does. Turned end for end, U is
a lower triangular L, which is what the factorisation gives: columns lie in reverse order here, the first to be
visited last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from quantize.methods.grid import Grid, Scheme, dequantize, fit_grid, groups_of
from safevlm.errors import InputError

__all__ = ["ActOrder", "SolveOptions", "Solved", "rows_together", "solve"]

ActOrder = Literal["none", "group", "static"]
DAMP_GROWTH, DAMP_LIMIT = 10.0, 1e3
TOGETHER, TOGETHER_ON_GPU = 2**23, 2**27
"""Weights that are rounded together. A GPU takes as long to start an operation as to round thousands of rows, and each
column takes a dozen of them, however many rows there are."""
LOSS_BLOCK = 1024
PROBES = 64
EXACTLY = 2048
"""Up to this width the cost of rounding to the nearest is computed; above, it is estimated unless that is close."""
SURELY = 0.9
"""An estimate that is larger than the walk's cost by this factor settles which is better."""
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
    damp: float = 0.05
    search: bool = True
    block: int = 128

    def __post_init__(self) -> None:
        if not 0 < self.damp < 1:
            raise InputError(f"--damp {self.damp} is not allowed. Give a number above 0 and below 1; 0.05 is usual.")


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
    name: str = "the linear",
    again: Callable[[], Tensor] | None = None,
) -> list[Solved]:
    """Round linears that share their inputs (each R × C), in the dtype of ``hessian_CC``.

    Rows do not know of each other, so the result is that of solving each linear alone; together they take one
    factorisation and one walk over the columns. With ``again``, which makes H anew, ``hessian_CC`` is
    factorised in its own memory and lost.

    Raises InputError for a group size that does not divide C, or values that are not finite.
    """
    width = weights[0].shape[1]
    columns = scheme.columns(width, name)
    if not all(bool(torch.isfinite(each.sum())) for each in (*weights, hessian_CC)):
        raise InputError(f"{name}: weights or activations hold NaN or infinity.")
    diagonal = hessian_CC.diagonal().clone()
    dead = diagonal <= 0
    order = _order(diagonal, options.act_order).flip(0)
    own = hessian_CC if again is not None else hessian_CC.clone()
    lower, damp = _factor(own, dead, order, options.damp, again or (lambda: hessian_CC.clone()))
    damping = damp * float(diagonal[~dead].mean()) if not bool(dead.all()) else 0.0
    factor = _Factor(lower=lower, order=order, diagonal=diagonal, alive=~dead[order], damping=damping)
    exactly = width <= EXACTLY
    probes = factor.probes()
    ours, plain, signals = [], [], []
    for rows in _chunks(weights, diagonal):
        signals.append((rows @ probes).square().mean(dim=1))
        plain.append(_to_the_nearest(rows, factor, scheme, columns, None if exactly else probes).loss)
        ours.append(_walk(rows, factor, scheme, options, columns))
    whole, signal, cost_to_nearest = _joined(ours), torch.cat(signals), torch.cat(plain)
    ours.clear()
    found, start = [], 0
    for weight in weights:
        mine = whole.cut(slice(start, start + len(weight)))
        rtn_loss = float(cost_to_nearest[start : start + len(weight)].sum())
        start += len(weight)
        loss, chosen = float(mine.loss.sum()), mine
        if not loss < (1.0 if exactly else SURELY) * rtn_loss:  # false for NaN, too
            nearest = _joined([_to_the_nearest(rows, factor, scheme, columns) for rows in _chunks([weight], diagonal)])
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
                damp=damp,
                dead_columns=int(dead.sum()),
            )
        )
    return found


@dataclass(frozen=True, kw_only=True, eq=False)
class _Factor:
    """L with L Lᵀ = H + damping, its columns in ``order`` (the last is visited first), and what H was.

    ``diagonal`` is H's in the model's order; ``alive`` tells, in ``order``, which columns are not dead.
    """

    lower: Tensor
    order: Tensor
    diagonal: Tensor
    alive: Tensor
    damping: float

    def probes(self) -> Tensor:
        """Return C × 64, in the model's order: W times it has, squared, the mean tr(W H Wᵀ) of W's rows."""
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, (len(self.order), PROBES), generator=generator) * 2 - 1
        found = torch.empty(len(self.order), PROBES, dtype=self.lower.dtype, device=self.lower.device)
        found[self.order] = self.lower @ signs.to(self.lower)
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
    weight_RC: Tensor, factor: _Factor, scheme: Scheme, columns: int, probes: Tensor | None = None
) -> _Rows:
    """Round every weight by itself: a measure, and a way out. With ``probes`` its cost is estimated."""
    rows, width = weight_RC.shape
    grid = fit_grid(weight_RC, scheme, columns)
    scale, zero = grid.scale.unsqueeze(-1), grid.zero.unsqueeze(-1)
    grouped = weight_RC.reshape(rows, -1, columns)
    ints = torch.div(grouped, scale).round_().add_(zero).clamp_(0, scheme.largest)
    error = grouped - (ints - zero).mul_(scale)
    ints, error = ints.to(torch.uint8).reshape(rows, width), error.reshape(rows, width)
    group_of = groups_of(width, columns, weight_RC.device)
    if probes is not None:
        return _Rows(ints=ints, grid=grid, group_of=group_of, loss=(error @ probes).square_().mean(dim=1))
    error = error[:, factor.order]
    loss = -factor.damping * error[:, factor.alive].square().sum(dim=1)
    for start in range(0, width, LOSS_BLOCK):  # above the diagonal there is nothing
        stop = min(start + LOSS_BLOCK, width)
        part = error[:, start:] @ factor.lower[start:, start:stop]
        loss += part[:, factor.alive[start:stop]].square_().sum(dim=1)
    return _Rows(ints=ints, grid=grid, group_of=group_of, loss=loss.clamp(min=0))


def _order(diagonal: Tensor, act_order: ActOrder) -> Tensor:
    if act_order == "none":
        return torch.arange(len(diagonal), device=diagonal.device)
    return torch.argsort(diagonal, descending=True, stable=True)


def _factor(
    hessian: Tensor, dead: Tensor, order: Tensor, damp: float, again: Callable[[], Tensor]
) -> tuple[Tensor, float]:
    """Return lower triangular L with L Lᵀ = H + damping, columns in ``order``, and the damping that it took.

    L is in the memory of ``hessian``, by columns, as the factorisation wants it; ``again`` makes H for another try.
    """
    diagonal = hessian.diagonal().clone()
    mean = float(diagonal[~dead].mean()) if not bool(dead.all()) else 1.0
    filled = torch.where(dead, torch.full_like(diagonal, mean), diagonal)[order]
    while damp <= DAMP_LIMIT:
        _permute(hessian, order)
        hessian.diagonal().copy_(filled + damp * mean)
        lower = hessian.mT  # H is symmetric
        info = torch.empty((), dtype=torch.int32, device=hessian.device)
        torch.linalg.cholesky_ex(lower, out=(lower, info))
        if not int(info) and bool(torch.isfinite(lower.diagonal()).all()):
            return lower, damp
        damp *= DAMP_GROWTH
        hessian = again()
    raise InputError(
        "the second moments of a linear's inputs cannot be factorised, however much they are damped: activations are "
        "too large for float32. Check the checkpoint, or calibrate in float32."
    )


def _permute(matrix: Tensor, order: Tensor) -> None:
    """Bring rows and columns into an order, in place: entry i, j becomes that of order[i], order[j]."""
    source = order.tolist()
    done = [False] * len(source)
    for first, taken in enumerate(source):
        if done[first] or taken == first:
            continue
        kept, at = matrix[first].clone(), first
        while source[at] != first:  # along a cycle, each row takes the place that was read before it
            matrix[at] = matrix[source[at]]
            done[at], at = True, source[at]
        matrix[at], done[at] = kept, True
    for start in range(0, len(source), LOSS_BLOCK):
        rows = slice(start, start + LOSS_BLOCK)
        matrix[rows] = matrix[rows][:, order]


def _walk(weight_RC: Tensor, factor: _Factor, scheme: Scheme, options: SolveOptions, columns: int) -> _Rows:
    """Round columns from the last of the factor's order to its first."""
    rows, width = weight_RC.shape
    lower, order = factor.lower, factor.order
    importance = factor.diagonal if options.search else None
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
            moments = None if importance is None else importance[order[first:stop]].flip(0)
            fit, group = fit_grid(found, scheme, columns, moments), (width - stop) // columns
            scales[:, group], zeros[:, group] = fit.scale[:, 0], fit.zero[:, 0]
        groups = group_of[start:stop]
        grid_of_block = (scales.T[groups], zeros.T[groups])
        _walk_block(slice(start, stop), owed, weight, factor, grid_of_block, scheme.largest, errors, ints, loss)
    loss -= factor.damping * errors[factor.alive].square_().sum(dim=0)
    back = torch.argsort(order)
    return _Rows(
        ints=ints[back].T.contiguous(),
        grid=Grid(scale=scales, zero=zeros),
        group_of=group_of[back],
        loss=loss.clamp_(min=0),
    )


def _walk_block(
    block: slice,
    owed_BR: Tensor,
    weight_CR: Tensor,
    factor: _Factor,
    grid_BR: tuple[Tensor, Tensor],
    largest: int,
    errors_CR: Tensor,
    ints_CR: Tensor,
    loss_R: Tensor,
) -> None:
    """Round a block's columns; ``owed_BR`` is what the errors behind the block make of (W - Q) L in it."""
    first, width = block.start, block.stop - block.start
    own = factor.lower[block, block]
    pivots, alive = own.diagonal().tolist(), factor.alive[block].tolist()
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
