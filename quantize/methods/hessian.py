"""The second moments of a linear's inputs: what its rounding error is measured by.

Shapes: T tokens, C input columns. Rounding W to Q costs tr((W - Q) H (W - Q)ᵀ), the squared error of the outputs
over the calibration tokens, with H the weighted mean of x xᵀ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from safevlm.errors import InputError

__all__ = ["CrossMoments", "Hessian"]

BLOCK = 192
STRONG_SHARE = 32
"""One in so many tokens, those with the largest inputs, are multiplied in float32 whatever the others are."""


class Hessian:
    """Adds up inputs as they come. Memory: C × C float32, and a copy of the tokens being added when weighted.

    With ``products`` bfloat16 the factors of products are rounded to it and products are added up in float32. The few
    tokens whose inputs are huge (attention sinks) are multiplied in float32: a CPU gives a product in its factors'
    dtype, and rounding a sum that they rule would drown all others.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu", products: torch.dtype = torch.float32) -> None:
        self._sum_CC = torch.zeros(width, width, device=device)
        self._products = products
        self.weight = 0.0
        """Total weight of the tokens so far."""

    @torch.no_grad()
    def add(self, inputs_TC: Tensor, weights_T: Tensor | None = None) -> None:
        """Add tokens, each counted ``weights_T`` times (at least 0; once where it is None).

        Raises InputError for inputs that are not finite.
        """
        inputs = inputs_TC.to(self._sum_CC.dtype)
        if weights_T is None:
            self.weight += len(inputs)
        else:
            self.weight += float(weights_T.sum())
            inputs = inputs * weights_T.to(inputs.dtype).sqrt().unsqueeze(-1)
        if not bool(torch.isfinite(inputs.sum())):
            raise InputError("activations hold NaN or infinity")
        if self._products != torch.float32:
            inputs = self._add_rounded(inputs)
        for start in range(0, inputs.shape[1], BLOCK):  # the sum is symmetric: its lower blocks are filled at the end
            rows = slice(start, start + BLOCK)
            self._sum_CC[rows, start:].addmm_(inputs[:, rows].T, inputs[:, start:])

    def _add_rounded(self, inputs_TC: Tensor) -> Tensor:
        """Add tokens with factors rounded, but for the strongest ones, which are returned."""
        strong = inputs_TC.square().sum(dim=1).topk(-(-len(inputs_TC) // STRONG_SHARE)).indices
        left = inputs_TC[strong]
        rounded = inputs_TC.to(self._products).index_fill_(0, strong, 0)
        for start in range(0, rounded.shape[1], BLOCK):
            rows = slice(start, start + BLOCK)
            one, other = rounded[:, rows].T, rounded[:, start:]
            if rounded.is_cuda:
                self._sum_CC[rows, start:] += torch.mm(one, other, out_dtype=torch.float32)
            else:
                self._sum_CC[rows, start:] += one @ other
        return left

    def mean(self) -> Tensor:
        """Return H, C × C, and forget the sum. Raises InputError when no token was added."""
        if self.weight <= 0:
            raise InputError("no calibration token reached this layer. Its samples are empty, or their weight is 0.")
        weight, self.weight = self.weight, 0.0
        for start in range(BLOCK, len(self._sum_CC), BLOCK):
            rows = slice(start, start + BLOCK)
            self._sum_CC[rows, :start] = self._sum_CC[:start, rows].T
        return self._sum_CC.div_(weight)


class CrossMoments:
    """Adds up (x - y) yᵀ, C × C, over tokens that a linear reads as x in one model and as y in another.

    ``products`` are as those of :class:`Hessian`. Differences are taken before they are rounded.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu", products: torch.dtype = torch.float32) -> None:
        self._sum_CC = torch.zeros(width, width, device=device)
        self._products = products
        self.weight = 0.0
        """Total weight of the tokens so far."""

    @torch.no_grad()
    def add(self, original_TC: Tensor, inputs_TC: Tensor, weights_T: Tensor | None = None) -> None:
        """Add tokens, each counted ``weights_T`` times (at least 0; once where it is None).

        Raises InputError for inputs that are not finite.
        """
        inputs = inputs_TC.float()
        differences = original_TC.float() - inputs
        if weights_T is None:
            self.weight += len(inputs)
        else:
            self.weight += float(weights_T.sum())
            differences *= weights_T.float().unsqueeze(-1)
        if not bool(torch.isfinite(differences.sum())):
            raise InputError("activations hold NaN or infinity")
        if self._products != torch.float32:
            differences, inputs = self._add_rounded(differences, inputs)
        self._sum_CC.addmm_(differences.T, inputs)

    def _add_rounded(self, differences_TC: Tensor, inputs_TC: Tensor) -> tuple[Tensor, Tensor]:
        """Add tokens with factors rounded, but for the strongest ones, which are returned."""
        size = differences_TC.square().sum(dim=1) * inputs_TC.square().sum(dim=1)
        strong = size.topk(-(-len(inputs_TC) // STRONG_SHARE)).indices
        left = differences_TC[strong], inputs_TC[strong]
        one = differences_TC.to(self._products).index_fill_(0, strong, 0).T
        other = inputs_TC.to(self._products)
        self._sum_CC += torch.mm(one, other, out_dtype=torch.float32) if one.is_cuda else one @ other
        return left

    def mean(self) -> Tensor:
        """Return the weighted mean and forget the sum. Raises InputError when no token was added."""
        if self.weight <= 0:
            raise InputError("no calibration token reached this layer. Its samples are empty, or their weight is 0.")
        weight, self.weight = self.weight, 0.0
        return self._sum_CC.div_(weight)
