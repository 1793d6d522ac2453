"""Factors by which a linear's inputs are divided and its weight multiplied before both are rounded to 8 bits.

Inputs are divided by a factor a channel, weights multiplied by it (SmoothQuant, Xiao et al. 2023,
https://arxiv.org/abs/2211.10438). Its exponents are a coarse beginning: from the best of them the factors descend the
error that they lead us to expect, for which no product of matrices is needed.

Shapes: T tokens, R output rows, C input columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["SMALLEST", "WEIGHT_SHARE", "descend", "migration"]

SMALLEST = 1e-5
WEIGHT_SHARE = 0.5
"""What GPTQ leaves of a rounded weight's error, about: the inputs' error counts whole."""
LEVELS = 127.5
ROWS = 4096
"""Output rows that are looked at, spread over all."""
RATE = 0.06
FIRST_DECAY, SECOND_DECAY = 0.9, 0.999


def migration(largest_C: Tensor, widest_C: Tensor, strength: float) -> Tensor:
    """Return SmoothQuant's factors, C: max|x|^strength / max|w|^(1 - strength), their geometric mean 1."""
    if strength == 0:
        return torch.ones_like(largest_C)
    factor = largest_C.clamp(min=SMALLEST) ** strength / widest_C ** (1 - strength)
    factor = torch.where(largest_C > 0, factor, torch.ones_like(factor)).clamp(min=SMALLEST)
    return factor / factor.log().mean().exp()


def descend(
    factor_C: Tensor, sample_TC: Tensor, weights_RC: Sequence[Tensor], place_C: Tensor, *, steps: int
) -> Tensor:
    """Return factors, C, of less expected error: Adam (Kingma & Ba 2015) on their logarithms, geometric mean 1.

    A number that is rounded in steps of s is off by s² / 12 on average. A token's step is its largest divided channel
    over 127.5, a row's its largest multiplied weight. Channels of the same ``place_C`` (whole numbers from 0) have one
    factor.
    """
    taken = max(1, sum(len(weight) for weight in weights_RC) // ROWS)
    inputs_TC = sample_TC.abs()
    rows_RC = torch.cat([weight[::taken].float() for weight in weights_RC]).abs_()
    power_C = sample_TC.square().mean(dim=0)
    gain_C = rows_RC.square().sum(dim=0)
    count = int(place_C.max()) + 1
    logs = _summed(factor_C.log(), place_C, count) / _summed(torch.ones_like(factor_C), place_C, count)
    first, second = torch.zeros_like(logs), torch.zeros_like(logs)
    for step in range(1, steps + 1):
        slope = _summed(_slope(logs.exp()[place_C], inputs_TC, rows_RC, power_C, gain_C), place_C, count)
        first.lerp_(slope, 1 - FIRST_DECAY)
        second.lerp_(slope.square(), 1 - SECOND_DECAY)
        size = (second / (1 - SECOND_DECAY**step)).sqrt().clamp(min=1e-12)
        logs -= RATE * (1 - (step - 1) / steps) * first / (1 - FIRST_DECAY**step) / size
    found = logs.exp()[place_C]
    return found / found.log().mean().exp()


def _slope(factor_C: Tensor, inputs_TC: Tensor, rows_RC: Tensor, power_C: Tensor, gain_C: Tensor) -> Tensor:
    """Return the derivative of the error's logarithm by each factor's, C.

    The error is that of inputs, mean of s² times the sum of f² · ``gain``, and ``WEIGHT_SHARE`` of the weights', sum of
    s² times the sum of ``power`` / f². Of a maximum only the channel that it is at has a slope.
    """
    token_T, at_T = (inputs_TC / factor_C).max(dim=1)
    row_R, at_R = (rows_RC * factor_C).max(dim=1)
    token_T, row_R = (token_T / LEVELS).square() / len(token_T), (row_R / LEVELS).square() * WEIGHT_SHARE
    passed_C, kept_C = factor_C.square() * gain_C, power_C / factor_C.square()
    inputs, outputs = token_T.sum() * passed_C.sum(), row_R.sum() * kept_C.sum()
    slope_C = 2 * (token_T.sum() * passed_C - row_R.sum() * kept_C)
    slope_C -= _summed(2 * token_T * passed_C.sum(), at_T, len(factor_C))
    slope_C += _summed(2 * row_R * kept_C.sum(), at_R, len(factor_C))
    return slope_C / (inputs + outputs).clamp(min=1e-30)


def _summed(values: Tensor, places: Tensor, count: int) -> Tensor:
    """Return the sum of the values of each place; on the host, since a GPU adds in an order that changes."""
    found = torch.zeros(count, dtype=values.dtype).index_add_(0, places.cpu(), values.cpu())
    return found.to(values.device)
