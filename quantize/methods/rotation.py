"""Orthogonal matrices that are merged into a language model's weights, so that outliers are spread over the channels.

The model computes the same (QuaRot, Ashkboos et al. 2024, https://arxiv.org/abs/2404.00456, section 4, stages 1a and
1b): what a linear writes is turned, what reads it is turned likewise, and no kernel is needed. Two places allow it:
``values``, between ``v_proj`` and ``o_proj``, and ``residual``, the stream that all blocks read and write. Norms
without a weight commute with it, so their weights go into the linears behind them.

Shapes: D width, K heads, H width of a head, R output rows, C input columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from safevlm.checkpoint.checkpoint import Checkpoint
from safevlm.errors import InputError

__all__ = ["ROTATIONS", "Orthogonal", "Rotate", "check_rotation", "hadamard", "orthogonal"]

Rotate = Literal["none", "values", "residual", "both"]
ROTATIONS: tuple[Rotate, ...] = get_args(Rotate)
LARGEST_FACTOR = 64
"""Powers of two are split into factors of this order: small matrices are multiplied faster than one large one."""
PALEY_PRIMES = (5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59)
BLOCK = 1 << 22
"""Numbers that are turned at once: in float64 they take 32 MiB."""


@dataclass(frozen=True, eq=False)
class Orthogonal:
    """A random orthogonal matrix of each of K heads: signs, K × D, and then the Kronecker product of ``factors``."""

    signs: Tensor
    factors: tuple[Tensor, ...]

    def turn(self, rows: Tensor) -> Tensor:
        """Return … × D rows times the matrix, in float32; where there are several heads, … × K × D by theirs."""
        width = self.signs.shape[1]
        heads = rows.reshape(-1, len(self.signs), width)
        found = torch.empty(heads.shape, dtype=torch.float32)
        step = max(1, BLOCK // (heads.shape[1] * width))
        for start in range(0, len(heads), step):
            found[start : start + step] = self._turn(heads[start : start + step])
        return found.reshape(rows.shape)

    def turn_outputs(self, weight_RC: Tensor) -> Tensor:
        """Return a linear's weight whose R outputs are turned."""
        return self.turn(weight_RC.T).T.contiguous()

    def _turn(self, heads_NKD: Tensor) -> Tensor:
        values = heads_NKD.double() * self.signs
        shape = values.shape
        left, right = 1, shape[-1]
        for factor in self.factors:
            right //= len(factor)
            values = torch.einsum("nlfr,fg->nlgr", values.reshape(-1, left, len(factor), right), factor)
            left *= len(factor)
        return values.reshape(shape).float()


def orthogonal(width: int, seed: int, heads: int = 1) -> Orthogonal:
    """Return a randomised Hadamard matrix, or a random one where no Hadamard matrix of that width is known.

    Each of several heads has signs of its own. The same seed gives the same matrix.
    """
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (heads, width), generator=generator).double() * 2 - 1
    factors = _hadamard_factors(width)
    if factors is None:
        square = torch.randn(width, width, generator=generator, dtype=torch.float64)
        factors = [torch.linalg.qr(square).Q]
    return Orthogonal(signs, tuple(factors))


def hadamard(order: int) -> Tensor | None:
    """Return a symmetric or skew Hadamard matrix of ±1, float64, or ``None`` for an order that Paley's give not.

    Sylvester's for powers of two; Paley's two constructions (1933) for q + 1 and 2 (q + 1) with q prime.
    """
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if order & (order - 1) == 0:
        half = hadamard(order // 2)
        assert half is not None
        return torch.cat([torch.cat([half, half], dim=1), torch.cat([half, -half], dim=1)])
    for prime in PALEY_PRIMES:
        if prime % 4 == 3 and order == prime + 1:
            return _bordered(prime, -1) + torch.eye(order, dtype=torch.float64)
        if prime % 4 == 1 and order == 2 * (prime + 1):
            core, ones = _bordered(prime, 1), torch.eye(prime + 1, dtype=torch.float64)
            two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
            flipped = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
            return torch.kron(core, two) + torch.kron(ones, flipped)
    return None


def _bordered(prime: int, sign: int) -> Tensor:
    """Return Jacobsthal's matrix of quadratic residues with a border of ones, the column's of ``sign``."""
    residues = {number * number % prime for number in range(1, prime)}
    character = torch.tensor([0.0, *(1.0 if number in residues else -1.0 for number in range(1, prime))])
    places = torch.arange(prime)
    core = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    core[1:, 1:] = character[(places.unsqueeze(1) - places) % prime]
    core[0, 1:], core[1:, 0] = 1, sign
    return core


def _hadamard_factors(width: int) -> list[Tensor] | None:
    """Return orthogonal factors whose Kronecker product is a Hadamard matrix over the root of its width."""
    odd = width
    while odd % 2 == 0:
        odd //= 2
    first = next((odd << shift for shift in range(4) if hadamard(odd << shift) is not None), None)
    if first is None or width % first:
        return None
    orders, left = [first], width // first
    while left > 1:
        orders.append(min(left, LARGEST_FACTOR))
        left //= orders[-1]
    found = [hadamard(order) for order in orders if order > 1] or [hadamard(1)]
    return [each / math.sqrt(len(each)) for each in found if each is not None]


def check_rotation(checkpoint: Checkpoint, rotate: Rotate) -> None:
    """Raise InputError for a rotation that does not exist or that the family's norms do not allow."""
    if rotate not in ROTATIONS:
        raise InputError(f"--rotate {rotate} does not exist. Use one of {', '.join(ROTATIONS)}.")
    if rotate in ("residual", "both") and checkpoint.family.image_linear is None:
        raise InputError(
            f"--rotate {rotate}: {checkpoint.family.title} has norms on what its blocks add to the residual stream, so "
            "only a kernel could turn it. Use --rotate values."
        )
