"""Rows of a layer that nothing is learnt from: they tell whether what was learnt is better than what stood before.

Shapes: B rows, L positions, T = B · L tokens, C input columns.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quantize.streamed.layers import Stage

__all__ = ["Unseen", "surely_less"]

HELD_OUT = 8
"""One row in so many is held out."""
TOKENS = 1024
"""Of the rows held out, padding included, about: each look runs the layer over them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Unseen:
    """Rows held out by batch, the same for every layer, and what the 16-bit layer makes of what it reads there."""

    stage: Stage
    rows: Mapping[int, Tensor]
    wanted: Mapping[int, Tensor]

    @classmethod
    def of(cls, stage: Stage) -> Unseen:
        """Draw the rows and run the layer, which is still as it was read; a lone row is held out and learnt from."""
        places = [(number, row) for number, (rows, _, _) in enumerate(stage.hidden.shapes) for row in range(rows)]
        drawn = torch.randperm(len(places), generator=torch.Generator().manual_seed(0)).tolist()
        chosen: dict[int, list[int]] = {}
        tokens = 0
        for place in drawn[: max(1, len(places) // HELD_OUT)]:
            number, row = places[place]
            chosen.setdefault(number, []).append(row)
            tokens += stage.hidden.shapes[number][1]
            if tokens >= TOKENS:
                break
        rows = {number: torch.tensor(sorted(each)) for number, each in chosen.items()}
        return cls(stage=stage, rows=rows, wanted={number: _output(stage, number, at) for number, at in rows.items()})

    def learnt_from(self, number: int) -> Tensor:
        """Return which tokens of a batch may be learnt from, T."""
        rows, length, _ = self.stage.hidden.shapes[number]
        seen = torch.ones(rows, dtype=torch.bool)
        if number in self.rows and sum(each[0] for each in self.stage.hidden.shapes) > 1:
            seen[self.rows[number]] = False
        return seen.repeat_interleave(length)

    def errors(self, instead: Mapping[str, Callable[[Tensor], Tensor]]) -> Tensor:
        """Return the tokens' squared errors relative to what they are to be, times their shares of all weights.

        ``instead`` says what linears of the layer, by name, give for what they read.
        """
        with contextlib.ExitStack() as stack:
            for name, give in instead.items():
                stack.enter_context(_given(self.stage.linear(name), give))
            found = [self._errors(number) for number in self.rows]
        weights = torch.cat([_weights(self.stage, number)[at].flatten() for number, at in self.rows.items()])
        return torch.cat(found).cpu() * (weights.cpu() / weights.sum().clamp(min=1e-12).cpu())

    def _errors(self, number: int) -> Tensor:
        wanted = self.wanted[number]
        error = (_output(self.stage, number, self.rows[number]) - wanted).square().mean(dim=-1)
        return (error / wanted.square().mean(dim=-1).clamp(min=1e-12)).flatten()


def surely_less(errors_T: Tensor, before_T: Tensor) -> bool:
    """Return whether the same tokens' errors are less than before by more than the standard error of the difference."""
    difference_T = errors_T - before_T
    return bool(difference_T.sum() < -difference_T.square().sum().sqrt())


def _output(stage: Stage, number: int, at: Tensor) -> Tensor:
    """Return what the layer makes of some rows of a batch."""
    batch = stage.batches[number]
    masks = {name: mask[at] for name, mask in batch.masks.items()}
    some = replace(batch, masks=masks, position_ids=batch.position_ids[..., at, :])
    return stage.stream.run_layer(stage.index, stage.layer, some, stage.hidden[number][at]).float()


def _weights(stage: Stage, number: int) -> Tensor:
    if stage.weights is None:
        return stage.batches[number].masks["attention_mask"].float()
    return stage.weights[number].reshape(stage.hidden.shapes[number][:2])


@contextlib.contextmanager
def _given(linear: Any, give: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let a linear give something else for a while."""
    linear.forward = give
    try:
        yield
    finally:
        del linear.forward
