"""How image features become one row: what a guard head reads.

Shapes: N images, T image tokens, D width of the language model, P pooled features.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = ["POOLINGS", "Pooling", "pool", "pooled_width"]

Pooling = Literal["mean", "mean_max_std"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)


def pool(features_NTD: Tensor, pooling: Pooling) -> Tensor:
    """Pool image features over their tokens: N × P in float32, P = D for ``mean``, 3 · D for ``mean_max_std``.

    The standard deviation is the population's (divided by T).
    """
    features = features_NTD.float()
    mean = features.mean(dim=1)
    if pooling == "mean":
        return mean
    spread = (features - mean.unsqueeze(1)).square().mean(dim=1).sqrt()
    return torch.cat([mean, features.amax(dim=1), spread], dim=-1)


def pooled_width(pooling: Pooling, width: int) -> int:
    """Return P for image features of ``width`` D."""
    return width if pooling == "mean" else 3 * width
