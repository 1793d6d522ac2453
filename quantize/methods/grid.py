"""Grids of quantized weights: which numbers a weight may take, and how a grid is fitted to it.

Shapes: R output rows, C input columns, G groups of columns. A weight of row r and column c is stored as an integer
``q`` of ``bits`` bits and stands for ``scale[r, g] * (q - zero[r, g])`` with g the column's group.

A symmetric grid has one level more on one side of zero. The sign of its scale chooses which.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from safevlm.checkpoint.weights.quantized import BITS
from safevlm.errors import InputError

__all__ = ["LARGEST", "SMALLEST", "Grid", "Scheme", "dequantize", "fit_grid", "groups_of", "round_to_grid"]

PER_CHANNEL = -1
SHRINKS = {
    2: (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55),
    3: (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7),
    4: (1.0, 0.95, 0.9, 0.85, 0.8),
    8: (1.0, 0.95),
}
"""Shares of the full range that a searched grid tries, by bits: clipping few large weights can spare many small."""
SMALLEST, LARGEST = 2.0**-24, 65504.0
"""Of the magnitudes of scales that float16 holds, in which they are stored."""
PIECE = 2**17
"""Weights whose grids are searched together: what is made of them stays near the processor."""


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How weights are stored: integer bits, columns that share a scale (-1: a whole row), symmetric or not.

    ``signed`` lets scales of symmetric grids be negative; an asymmetric grid does not need it.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    signed: bool = True

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise InputError(f"--bits {self.bits} is not allowed. Give one of {', '.join(map(str, BITS))}.")
        if self.group_size != PER_CHANNEL and (self.group_size < 8 or self.group_size % 8):
            raise InputError(
                f"--group-size {self.group_size} is not allowed. Give a multiple of 8, or -1 for one scale per row; "
                "128 is usual."
            )

    @property
    def largest(self) -> int:
        """The largest integer that is stored."""
        return int(2**self.bits - 1)

    @property
    def either_sign(self) -> bool:
        """Whether a scale may be negative."""
        return self.symmetric and self.signed

    def columns(self, width: int, name: str) -> int:
        """Return the columns of a group in a weight of ``width`` columns.

        Raises InputError when they do not divide it, with the sizes nearby that do.
        """
        if self.group_size == PER_CHANNEL:
            return width
        if width % self.group_size == 0:
            return self.group_size
        fitting = [size for size in range(8, width + 1, 8) if width % size == 0]
        below = [size for size in fitting if size < self.group_size][-1:]
        above = [size for size in fitting if size > self.group_size][:1]
        nearest = " and ".join(map(str, below + above)) or "none"
        raise InputError(
            f"--group-size {self.group_size} does not divide the {width} input columns of {name}. The nearest that do: "
            f"{nearest}, or -1 for one scale per row."
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Grid:
    """Scales and zeros, R × G: float values that float16 holds exactly, never 0, and whole numbers from 1 on.

    A zero of 0 is never used: the v1 file format stores zero - 1, which some readers then misread without a word.
    """

    scale: Tensor
    zero: Tensor


def groups_of(width: int, columns: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the group of each column when groups are neighbours: int64, C."""
    return torch.arange(width, device=device) // columns


def fit_grid(weight_RC: Tensor, scheme: Scheme, columns: int, importance_C: Tensor | None = None) -> Grid:
    """Fit a grid to groups of ``columns`` neighbouring columns.

    Without ``importance_C`` a group's range is that of its weights. With it, shrunk ranges are tried, too, and each
    group takes the one with the least squared rounding error, column errors weighted by importance. Where a scale
    may be negative, the additional level is at the side of the largest weight, or at either side, whichever is best.

    Raises InputError for a weight whose scale float16 cannot hold.
    """
    rows, width = weight_RC.shape
    grouped = weight_RC.reshape(rows, width // columns, columns)
    importance = None if importance_C is None else importance_C.reshape(width // columns, columns)
    piece = max(1, PIECE // width)
    fits = [_fit(grouped[start : start + piece], scheme, importance) for start in range(0, rows, piece)]
    return Grid(scale=torch.cat([fit.scale for fit in fits]), zero=torch.cat([fit.zero for fit in fits]))


def _fit(grouped_RGN: Tensor, scheme: Scheme, importance_GN: Tensor | None) -> Grid:
    """Fit a grid to groups of N weights, as :func:`fit_grid` does."""
    low, high = grouped_RGN.amin(dim=-1).clamp(max=0), grouped_RGN.amax(dim=-1).clamp(min=0)
    if importance_GN is None:
        plain = _grid_of(low, high, scheme)
        return _turned(plain, high > -low) if scheme.either_sign else plain
    best, least = None, torch.empty(0)
    for tried in _candidates(low, high, scheme):
        scale, zero = tried.scale.unsqueeze(-1), tried.zero.unsqueeze(-1)
        found = torch.div(grouped_RGN, scale).round_().add_(zero).clamp_(0, scheme.largest).sub_(zero).mul_(scale)
        error = torch.einsum("rgn,gn->rg", found.sub_(grouped_RGN).square_(), importance_GN)
        if best is None:
            best, least = tried, error
            continue
        better = error < least
        least = torch.where(better, error, least)
        best = Grid(scale=torch.where(better, tried.scale, best.scale), zero=torch.where(better, tried.zero, best.zero))
    assert best is not None
    return best


def _candidates(low: Tensor, high: Tensor, scheme: Scheme) -> Iterator[Grid]:
    for shrink in SHRINKS[scheme.bits]:
        tried = _grid_of(low * shrink, high * shrink, scheme)
        yield tried
        if scheme.either_sign:
            yield _turned(tried, torch.ones_like(low, dtype=torch.bool))


def _turned(grid: Grid, where: Tensor) -> Grid:
    """Return the grid with the additional level above zero instead of below, for some of its groups."""
    return Grid(scale=torch.where(where, -grid.scale, grid.scale), zero=grid.zero)


def _grid_of(low: Tensor, high: Tensor, scheme: Scheme) -> Grid:
    """Return the grid that spans ``low`` <= 0 to ``high`` >= 0."""
    if scheme.symmetric:
        reach = torch.maximum(-low, high)
        scale = _storable(2 * reach / scheme.largest, reach == 0)
        return Grid(scale=scale, zero=torch.full_like(scale, 2 ** (scheme.bits - 1)))
    nothing = (low == 0) & (high == 0)
    scale = _storable((high - low) / scheme.largest, nothing)
    zero = torch.round(-low / scale).clamp(1, scheme.largest)
    # where zero had to become 1, the steps above it must still reach as far
    scale = torch.maximum(scale, _storable(high / (scheme.largest - zero).clamp(min=1), nothing))
    return Grid(scale=torch.where(zero > 1, _storable((high - low) / scheme.largest, nothing), scale), zero=zero)


def _storable(scale: Tensor, nothing: Tensor) -> Tensor:
    """Round scales, positive ones, to float16; a group of zeros gets 1, a tiny one the smallest that there is."""
    scale = torch.where(nothing, torch.ones_like(scale), scale)
    if not bool((scale <= LARGEST).all()):  # also for NaN
        raise InputError(
            f"a weight of the model is not finite or its scale exceeds float16's {LARGEST:g}: it cannot be quantized. "
            "Check the checkpoint."
        )
    return scale.clamp(min=SMALLEST).to(torch.float16).to(scale.dtype)


def round_to_grid(weight_RC: Tensor, grid: Grid, scheme: Scheme, group_of_C: Tensor) -> Tensor:
    """Return the nearest integers, float R × C from 0 to ``scheme.largest``."""
    scale, zero = grid.scale[:, group_of_C], grid.zero[:, group_of_C]
    return (torch.round(weight_RC / scale) + zero).clamp_(0, scheme.largest)


def dequantize(ints_RC: Tensor, grid: Grid, group_of_C: Tensor) -> Tensor:
    """Return the weights that integers stand for, in the grid's dtype."""
    rows, width = ints_RC.shape
    columns = width // grid.scale.shape[1]
    if torch.equal(group_of_C, groups_of(width, columns, group_of_C.device)):  # no need to spread the grid out
        above_zero = ints_RC.reshape(rows, -1, columns).to(grid.scale.dtype) - grid.zero.unsqueeze(-1)
        return above_zero.mul_(grid.scale.unsqueeze(-1)).reshape(rows, width)
    return (ints_RC.to(grid.scale.dtype) - grid.zero[:, group_of_C]) * grid.scale[:, group_of_C]
