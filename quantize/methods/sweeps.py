"""Less error in integers and scales that stand: coordinate descent over both, as GPTQ leaves them.

The cost of a row's errors e is e H eᵀ. A sweep goes once over the columns, a tile at a time: each scale moves to where
the cost is least while the rest stands (as a stored number can), then each integer. H times the errors is made anew for
each tile, so a sweep costs R C² multiplications and little more.

Shapes: R output rows, C input columns, G groups of neighbouring columns, T columns of a tile. Columns are rows here,
so that one column of the weight is one run of memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantize.methods.grid import LARGEST, SMALLEST, Scheme

__all__ = ["Standing", "sweep"]

TILE = 128
INNER = 32
"""Columns that are made up for one by one before a matrix product takes them together."""
TINY = 1e-30


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


def sweep(rows: Standing, hessian_CC: Tensor, scheme: Scheme) -> Tensor:
    """Go over all columns once and return what each row costs then, R. No row costs more than before.

    Columns whose diagonal entry is 0 keep their integers.
    """
    width, columns = len(rows.ints), len(rows.ints) // len(rows.scale)
    tile = max(1, TILE // columns) * columns
    cost = torch.zeros_like(rows.errors[0])
    for start in range(0, width, tile):
        here = slice(start, min(start + tile, width))
        own = hessian_CC[here, here]
        before = hessian_CC[here, :start] @ rows.errors[:start]
        slopes = torch.addmm(before, hessian_CC[here, start:], rows.errors[start:])
        for first in range(here.start, here.stop, columns):
            _move_scale(rows, slice(first, first + columns), first - start, own, slopes, scheme)
        _move_ints(rows, here, own, slopes, scheme.largest)
        errors = rows.errors[here]
        cost += (before.mul_(2).addmm_(own, errors) * errors).sum(dim=0)
    return cost


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
