"""Less error in integers and scales that stand: coordinate descent over both, as GPTQ leaves them.

The cost of a row's errors e is e H eᵀ. A sweep goes once over the columns, a tile at a time: each scale moves to where
the cost is least while the rest stands (as a stored number can), then each integer. H times the errors has two parts
for each tile, of the tiles that the sweep has been at and of those still to come. Sweeps go there and back, so the
second part is what the sweep before made as its first part: N sweeps cost (N + 1) / 2 times R C² multiplications and
little more (Conrad and Wallach 1979 keep halves of symmetric relaxation so).

Factors of these products may be rounded to bfloat16: a step that is a little off is followed by others. What a row
costs in the end is not rounded. Rounding is relative, so columns with huge inputs (attention sinks) need no care of
their own: errors in them are as much smaller.

Shapes: R output rows, C input columns, G groups of neighbouring columns, T columns of a tile. Columns are rows here,
so that one column of the weight is one run of memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantize.methods.grid import LARGEST, SMALLEST, Scheme
from quantize.methods.moments import INNER

__all__ = ["Standing", "sweep"]

TILE = 128
TINY = 1e-30
DEPTH = 4096
"""Columns whose rounded products are added up together: a CPU gives the sum in the factors' dtype."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Standing:
    """Rows in work: integers and stored weights less true ones, C × R, scales and zeros, G × R."""

    ints: Tensor
    errors: Tensor
    scale: Tensor
    zero: Tensor

    @classmethod
    def of(cls, weight_CR: Tensor, ints_CR: Tensor, scale_GR: Tensor, zero_GR: Tensor) -> Standing:
        """Return what stands, in memory of its own."""
        ints, scale = ints_CR.to(weight_CR), scale_GR.clone()
        stored = (ints.reshape(len(scale), -1, ints.shape[1]) - zero_GR.unsqueeze(1)).mul_(scale.unsqueeze(1))
        return cls(ints=ints, errors=stored.flatten(0, 1).sub_(weight_CR), scale=scale, zero=zero_GR)

    def round_again(self, columns: Tensor, largest: int) -> None:
        """Round some columns' weights to the nearest on the grid as it is now."""
        group = columns // (len(self.ints) // len(self.scale))
        scale, zero = self.scale[group], self.zero[group]
        before = self.ints[columns]
        weight = (before - zero) * scale - self.errors[columns]
        self.ints[columns] = torch.div(weight, scale).round_().add_(zero).clamp_(0, largest)
        self.errors[columns] += (self.ints[columns] - before) * scale


def sweep(
    rows: Standing, hessian_CC: Tensor, scheme: Scheme, times: int = 1, products: torch.dtype | None = None
) -> Tensor:
    """Go over all columns so many times and return what each row costs then, R. No row costs more than before.

    Columns whose diagonal entry is 0 keep their integers. With ``products`` narrower than H a row may cost more than
    before; what is returned is as exact as without.
    """
    width, columns = len(rows.ints), len(rows.ints) // len(rows.scale)
    tile = max(1, TILE // columns) * columns
    tiles = [slice(start, min(start + tile, width)) for start in range(0, width, tile)]
    exactly = _Products(hessian_CC, rows.errors)
    quickly = exactly if products in (None, hessian_CC.dtype) else _Rounded(hessian_CC, rows.errors, products)
    visited_CR = torch.empty_like(rows.errors)
    cost = torch.zeros_like(rows.errors[0])
    for number in range(times):
        onward, last = number % 2 == 0, number == times - 1
        for here in tiles if onward else reversed(tiles):
            before, behind = slice(0, here.start), slice(here.stop, width)
            own, errors = hessian_CC[here, here], rows.errors[here]
            made = (exactly if last else quickly).of(here, before if onward else behind)
            ahead = visited_CR[here] if number else quickly.of(here, behind)
            slopes = torch.addmm(made, own, errors).add_(ahead)
            for first in range(here.start, here.stop, columns):
                _move_scale(rows, slice(first, first + columns), first - here.start, own, slopes, scheme)
            _move_ints(rows, here, own, slopes, scheme.largest)
            quickly.moved(here)
            if last:
                cost += (made.mul_(2).addmm_(own, errors) * errors).sum(dim=0)
            else:
                visited_CR[here] = made
    return cost


class _Products:
    """Products of rows of H with the errors as they are when asked."""

    def __init__(self, hessian_CC: Tensor, errors_CR: Tensor) -> None:
        self._hessian, self._errors = hessian_CC, errors_CR

    def of(self, here: slice, columns: slice) -> Tensor:
        """Return H's rows ``here``, but only these columns of them, times the errors: T × R."""
        return self._hessian[here, columns] @ self._errors[columns]

    def moved(self, here: slice) -> None:
        """Take note that errors of these columns have changed."""


class _Rounded(_Products):
    """The same with rounded factors, added up in H's dtype."""

    def __init__(self, hessian_CC: Tensor, errors_CR: Tensor, dtype: torch.dtype) -> None:
        super().__init__(hessian_CC, errors_CR)
        self._rounded = errors_CR.to(dtype)

    def of(self, here: slice, columns: slice) -> Tensor:
        found = torch.zeros_like(self._errors[here])
        for start in range(columns.start, columns.stop, DEPTH):
            part = slice(start, min(start + DEPTH, columns.stop))
            one, other = self._hessian[part, here].mT.to(self._rounded.dtype), self._rounded[part]
            found += torch.mm(one, other, out_dtype=found.dtype) if one.is_cuda else one @ other
        return found

    def moved(self, here: slice) -> None:
        self._rounded[here] = self._errors[here]


def _move_scale(rows: Standing, group: slice, place: int, own_TT: Tensor, slopes_TR: Tensor, scheme: Scheme) -> None:
    """Give one group the scales that are best for its integers; ``place`` is where in the tile it begins."""
    here, number = slice(place, place + group.stop - group.start), group.start // (group.stop - group.start)
    scale = rows.scale[number]
    above_zero = rows.ints[group] - rows.zero[number]
    turned = own_TT[:, here] @ above_zero
    slope, bend = (above_zero * slopes_TR[here]).sum(dim=0), (above_zero * turned[here]).sum(dim=0)
    wanted = (scale - slope / bend.clamp(min=TINY)).clamp_(-LARGEST, LARGEST).to(torch.float16).to(scale.dtype)
    step = wanted - scale
    better = (step * (2 * slope + step * bend) < 0) & (wanted.abs() >= SMALLEST)
    if not scheme.either_sign:
        better &= wanted > 0
    step.mul_(better)
    scale += step
    rows.errors[group].addcmul_(above_zero, step)
    slopes_TR.addcmul_(turned, step)


def _move_ints(rows: Standing, tile: slice, own_TT: Tensor, slopes_TR: Tensor, largest: int) -> None:
    """Give each column of a tile, one after the other, the integers that are best while the others stand."""
    width, columns = len(own_TT), len(rows.ints) // len(rows.scale)
    bends = own_TT.diagonal().tolist()
    steps_BR = torch.empty_like(slopes_TR[:INNER])
    for first in range(0, width, INNER):
        stop = min(first + INNER, width)
        for k in range(first, stop):
            column, step = tile.start + k, steps_BR[k - first]
            if bends[k] <= 0:
                step.zero_()
                continue
            scale, ints = rows.scale[column // columns], rows.ints[column]
            wanted = torch.addcdiv(ints, slopes_TR[k], scale, value=-1 / bends[k]).round_().clamp_(0, largest)
            torch.sub(wanted, ints, out=step).mul_(scale)
            ints.copy_(wanted)
            if k + 1 < stop:
                slopes_TR[k + 1 : stop].addr_(own_TT[k, k + 1 : stop], step)
        rows.errors[tile.start + first : tile.start + stop] += steps_BR[: stop - first]
        if stop < width:
            slopes_TR[stop:].addmm_(own_TT[stop:, first:stop], steps_BR[: stop - first])
