"""The guard head as a torch module: pooled image features to class logits."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from safevlm.checkpoint.family import HEAD_PREFIX
from safevlm.network.filling import fill, on_meta

if TYPE_CHECKING:
    from safevlm.checkpoint.checkpoint import Checkpoint

__all__ = ["GuardHead", "build_head"]


class GuardHead(nn.Module):
    """``img_safety_head``: Linear, exact GELU, Dropout, …, Linear; N × D pooled features to N × C logits.

    ``widths`` are the widths from D to C; the Linears stand at 0, 3, 6, … of ``mlp``, as they are stored.
    """

    def __init__(self, widths: tuple[int, ...], *, dropout: float = 0.1) -> None:
        super().__init__()
        self.widths = widths
        steps: list[nn.Module] = []
        for inner, outer in itertools.pairwise(widths):
            steps += [nn.Linear(inner, outer), nn.GELU(), nn.Dropout(dropout)]
        self.mlp = nn.Sequential(*steps[:-2])

    @property
    def linears(self) -> list[tuple[Tensor, Tensor]]:
        """Weight and bias of each Linear, in order."""
        found = [layer for layer in self.mlp if isinstance(layer, nn.Linear)]
        return [(layer.weight, layer.bias) for layer in found]

    def forward(self, pooled_ND: Tensor) -> Tensor:
        """Return N × C logits in float32."""
        weight = cast(nn.Linear, self.mlp[0]).weight
        return cast(Tensor, self.mlp(pooled_ND.to(weight.dtype))).float()


def build_head(checkpoint: Checkpoint, *, dtype: torch.dtype = torch.float32) -> GuardHead:
    """Return the checkpoint's guard head, filled; CheckpointError when a tensor of it is missing."""
    head = on_meta(lambda: GuardHead(checkpoint.head.widths))
    fill(head, checkpoint.tensors, prefix=HEAD_PREFIX, dtype=dtype)
    return head
