"""Hold the weights of linear maps as ONNX multiplies them: inputs × outputs.

Preserves every value up to rounding. ``nn.Linear`` keeps outputs × inputs, and the exporter would make a transposed
copy of each beside it: at 400 M parameters 1.6 GiB more. Here one map is turned round at a time, in its place.

Shapes: I inputs, O outputs of a map.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["turn_weights_round"]


class _TransposedLinear(nn.Module):
    """``nn.Linear`` with its weight I × O."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight_IO = nn.Parameter(linear.weight.T.contiguous(), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        product = torch.matmul(x, self.weight_IO)
        return product if self.bias is None else product + self.bias


def turn_weights_round(module: nn.Module) -> None:
    """Replace every ``nn.Linear`` inside ``module``, wherever else it may be used, too."""
    parents = [each for each in module.modules() if not isinstance(each, nn.Linear)]  # holds none of what is replaced
    for parent in parents:
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, _TransposedLinear(child))
