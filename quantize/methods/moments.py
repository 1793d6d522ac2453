"""A linear's second moments and their Cholesky factor, in one memory of C × C.

The cost of the errors e of a row is e H eᵀ. Shapes: R output rows, C input columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from safevlm.errors import InputError

__all__ = ["INNER", "Moments"]

DAMP_GROWTH, DAMP_LIMIT = 10.0, 1e3
BLOCK = 1024
INNER = 32
"""Columns that are made up for one by one before a matrix product takes them together."""
PANEL = 256
"""Columns that are factorised together."""
PROBES = 64


class Moments:
    """H, its columns in some order: below the diagonal its factor L with L Lᵀ = H + damping while that is asked for.

    Takes the memory of ``hessian_CC`` and gives it back with :meth:`restore`, every number as it was.
    """

    def __init__(self, hessian_CC: Tensor) -> None:
        self.diagonal = hessian_CC.diagonal().clone()
        """H's, C, in the model's order."""
        self.dead = self.diagonal <= 0
        """Columns whose inputs are always zero, C, in the model's order."""
        self.mean = 1.0 if bool(self.dead.all()) else float(self.diagonal[~self.dead].mean())
        self.order = torch.arange(len(self.diagonal), device=hessian_CC.device)
        self.matrix = hessian_CC.mT
        """H, or above its diagonal H and below L, with L's diagonal: by columns, as factorisations want it."""
        self.damp, self._factorised = 0.0, False

    @property
    def damping(self) -> float:
        """What was added to the diagonal of H for the factorisation."""
        return 0.0 if bool(self.dead.all()) else self.damp * self.mean

    @property
    def alive(self) -> Tensor:
        """Which columns are not dead, in the present order."""
        return ~self.dead[self.order]

    def factorise(self, damp: float, order: Tensor) -> None:
        """Bring columns into ``order`` and find L, with more damping where that fails.

        Raises InputError where no damping helps.
        """
        self.arrange(order)
        filled = torch.where(self.dead, torch.full_like(self.diagonal, self.mean), self.diagonal)[order]
        self._factorised = True
        while damp <= DAMP_LIMIT:
            if _cholesky(self.matrix, filled + damp * self.mean):
                self.damp = damp
                return
            damp *= DAMP_GROWTH
            _mirror(self.matrix)
        raise InputError(
            "the second moments of a linear's inputs cannot be factorised, however much they are damped: activations "
            "are too large for float32. Check the checkpoint, or calibrate in float32."
        )

    def arrange(self, order: Tensor) -> None:
        """Bring columns into ``order``; of L nothing is left."""
        if self._factorised:
            _mirror(self.matrix)
            self._factorised = False
        self.matrix.diagonal().copy_(self.diagonal[self.order])
        if not torch.equal(order, self.order):
            _permute(self.matrix.mT, torch.argsort(self.order)[order])
            self.order = order
            self.matrix.diagonal().copy_(self.diagonal[order])

    def restore(self) -> None:
        """Give the memory back as it was."""
        self.arrange(torch.arange(len(self.order), device=self.order.device))

    def damp_diagonal(self) -> None:
        """Add the damping to H, but for dead columns; the next arrangement takes it away."""
        self.matrix.diagonal().add_(self.alive.to(self.matrix.dtype), alpha=self.damping)

    def probes(self) -> Tensor:
        """Return C × 64, in the model's order: W times it has, squared, the mean tr(W H Wᵀ) of W's rows."""
        generator = torch.Generator().manual_seed(0)
        signs = (torch.randint(0, 2, (len(self.order), PROBES), generator=generator) * 2 - 1).to(self.matrix)
        found = torch.empty_like(signs)
        for start in range(0, len(signs), BLOCK):
            rows = slice(start, start + BLOCK)
            product = self.matrix[rows, rows].tril() @ signs[rows]
            found[self.order[rows]] = product.addmm_(self.matrix[rows, :start], signs[:start])
        return found

    def cost(self, error_RC: Tensor) -> Tensor:
        """Return each row's cost, R, of errors whose columns are in the model's order."""
        error = error_RC[:, self.order]
        diagonal = self.diagonal[self.order]
        found = error.square() @ diagonal
        for start in range(0, len(diagonal), BLOCK):  # the half above the diagonal is H's in any case
            rows, later = slice(start, start + BLOCK), slice(start + BLOCK, None)
            product = error[:, rows] @ self.matrix[rows, rows].triu(1)
            found += 2 * (product * error[:, rows]).sum(dim=1)
            if start + BLOCK < len(diagonal):
                product = error[:, rows] @ self.matrix[rows, later]
                found += 2 * (product * error[:, later]).sum(dim=1)
        return found.clamp_(min=0)


def _cholesky(matrix: Tensor, diagonal: Tensor) -> bool:
    """Write L below and on the diagonal of a symmetric matrix whose diagonal is given; say whether there is one."""
    width = len(matrix)
    for start in range(0, width, PANEL):
        stop = min(start + PANEL, width)
        own, before = matrix[start:stop, start:stop], matrix[start:stop, :start]
        whole = own.clone()
        whole.diagonal().copy_(diagonal[start:stop])
        lower, info = torch.linalg.cholesky_ex(whole.addmm_(before, before.mT, alpha=-1))
        if int(info) or not bool(torch.isfinite(lower.diagonal()).all()):
            return False
        own.copy_(own.triu(1) + lower)
        if stop < width:
            below = matrix[stop:, start:stop].addmm_(matrix[stop:, :start], before.mT, alpha=-1)
            below.copy_(torch.linalg.solve_triangular(lower.mT, below, upper=True, left=False))
    return True


def _mirror(matrix: Tensor) -> None:
    """Copy what is above the diagonal below it."""
    for start in range(0, len(matrix), BLOCK):
        stop = start + BLOCK
        own = matrix[start:stop, start:stop]
        above = own.triu(1)
        own.copy_(above + above.mT)
        matrix[stop:, start:stop].copy_(matrix[start:stop, stop:].mT)


def _permute(matrix: Tensor, order: Tensor) -> None:
    """Bring rows and columns into an order, in place: entry i, j becomes that of order[i], order[j]."""
    source = order.tolist()
    done = [False] * len(source)
    for first, taken in enumerate(source):
        if done[first] or taken == first:
            continue
        kept, at = matrix[first].clone(), first
        while source[at] != first:  # along a cycle, each row takes the place that was read before it
            matrix[at] = matrix[source[at]]
            done[at], at = True, source[at]
        matrix[at], done[at] = kept, True
    for start in range(0, len(source), BLOCK):
        rows = slice(start, start + BLOCK)
        matrix[rows] = matrix[rows][:, order]
