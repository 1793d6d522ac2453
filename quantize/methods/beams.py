"""A block's columns rounded with several partial roundings of each row in hand, instead of one.

In the triangular form a column's share of the cost is known once it is rounded, so partial roundings can be compared:
at each column every one is continued with the integers nearest to its target, and the K that cost least go on. At the
block's end the best is taken.

Shapes: B columns of the block, K partial roundings, R output rows, I columns that are made up for one by one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantize.methods.moments import INNER

__all__ = ["best_of_block"]

TOGETHER = 2**20
"""Numbers that are held for the rows that are searched together: B K R."""


def best_of_block(
    weight_BR: Tensor,
    owed_BR: Tensor,
    own_BB: Tensor,
    alive: Sequence[bool],
    grid_BR: tuple[Tensor, Tensor],
    largest: int,
    beams: int,
) -> tuple[Tensor, Tensor]:
    """Return the errors W - Q of the best rounding found for each row, B × R, and what the block costs it, R.

    Columns go from the last to the first. ``own_BB`` is the factor's lower triangle, ``owed_BR`` what the errors of
    columns behind the block make of (W - Q) L in it. A column that is not ``alive`` costs nothing.
    """
    rows = weight_BR.shape[1]
    together = max(1, TOGETHER // (beams * len(weight_BR)))
    found = []
    for start in range(0, rows, together):
        part = slice(start, min(start + together, rows))
        grid = (grid_BR[0][:, part], grid_BR[1][:, part])
        found.append(_search(weight_BR[:, part], owed_BR[:, part], own_BB, alive, grid, largest, beams))
    return torch.cat([errors for errors, _ in found], dim=1), torch.cat([cost for _, cost in found])


def _search(
    weight_BR: Tensor,
    owed_BR: Tensor,
    own_BB: Tensor,
    alive: Sequence[bool],
    grid_BR: tuple[Tensor, Tensor],
    largest: int,
    beams: int,
) -> tuple[Tensor, Tensor]:
    width, rows = weight_BR.shape
    pivots = own_BB.diagonal().tolist()
    held_BKR = owed_BR.unsqueeze(1).repeat(1, beams, 1)  # what is owed to columns ahead, errors of those behind
    cost_KR = torch.full_like(held_BKR[0], torch.inf)
    cost_KR[0] = 0
    same_KR = torch.arange(beams, device=weight_BR.device).unsqueeze(1).repeat(1, rows)
    for stop in range(width, 0, -INNER):
        first = max(0, stop - INNER)
        piece_IKR, origin_KR = held_BKR[first:stop].clone(), same_KR
        for k in range(stop - 1, first - 1, -1):
            target = torch.add(weight_BR[k], piece_IKR[k - first], alpha=1 / pivots[k])
            stored_NKR = _nearest(target, grid_BR[0][k], grid_BR[1][k], largest, beams if alive[k] else 1)
            if alive[k]:
                costs = cost_KR + (target - stored_NKR).square_().mul_(pivots[k] ** 2)
                cost_KR, chosen = costs.flatten(0, 1).topk(beams, dim=0, largest=False)
                stored, parent = stored_NKR.flatten(0, 1).gather(0, chosen), chosen % beams
                piece_IKR = piece_IKR.gather(1, parent.expand_as(piece_IKR))
                origin_KR = origin_KR.gather(0, parent)
            else:
                stored = stored_NKR[0]
            error = weight_BR[k] - stored
            piece_IKR[: k - first] += own_BB[k, first:k, None, None] * error
            piece_IKR[k - first] = error
        held_BKR = held_BKR.gather(1, origin_KR.expand_as(held_BKR))
        held_BKR[first:stop] = piece_IKR
        if first:
            held_BKR[:first].flatten(1).addmm_(own_BB[first:stop, :first].T, piece_IKR.flatten(1))
    cost, best = cost_KR.min(dim=0)
    return held_BKR.gather(1, best.expand(width, 1, rows)).squeeze(1), cost


def _nearest(target_KR: Tensor, scale_R: Tensor, zero_R: Tensor, largest: int, most: int) -> Tensor:
    """Return up to ``most`` numbers of the grid that are nearest to each target, N × K × R."""
    count = min(most, largest + 1)
    place = target_KR / scale_R + zero_R
    lowest = torch.ceil(place - count / 2).clamp_(0, largest + 1 - count)
    steps = torch.arange(count, dtype=place.dtype, device=place.device)
    return (lowest + steps[:, None, None]).sub_(zero_R).mul_(scale_R)
