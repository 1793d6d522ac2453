"""Pool before the projector's last linear map, and fold that map into the head's first.

Preserves the guard's logits exactly (up to rounding): a mean over tokens commutes with an affine map, and two
affine maps without anything between them are one. With T tokens it saves T matrix products of M × D and the
head's D × D/2; what remains is one M × D/2 product an image.

Shapes: M width before the projector's last map, D width of the language model, K width of the head's first layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["fold_linear"]


def fold_linear(weight_DM: Tensor, bias_D: Tensor | None, following: nn.Linear) -> nn.Linear:
    """Return one M → K Linear equal to ``following`` after ``x @ weight.T + bias``; computed in float64."""
    outer = following.weight.double()
    weight = outer @ weight_DM.double()
    bias = torch.zeros(len(outer), dtype=torch.float64)
    if bias_D is not None:
        bias = bias + outer @ bias_D.double()
    if following.bias is not None:
        bias = bias + following.bias.double()
    folded = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    folded.weight = nn.Parameter(weight.to(following.weight.dtype), requires_grad=False)
    folded.bias = nn.Parameter(bias.to(following.weight.dtype), requires_grad=False)
    return folded
