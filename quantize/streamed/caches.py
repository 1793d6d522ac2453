"""What linears of the decoder layer at hand read, kept for all batches: of the rounded model, and of the 16-bit one.

Shapes: B samples a batch, L positions, T = B · L tokens, C columns of a linear.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calibration.streaming.sequential import Activations

__all__ = ["Caches", "OriginalInputs"]


class Caches:
    """What linears of the layer at hand read, so that nothing before them has to run again: T × C of every batch.

    A context manager. In memory up to ``max_bytes`` altogether, else in files in ``folder``.
    """

    def __init__(self, max_bytes: int | None = None, folder: Path | None = None) -> None:
        self._left = max_bytes
        self._folder = folder
        self._kept: dict[str, Activations] = {}

    def __enter__(self) -> Caches:
        return self

    def __exit__(self, *_: object) -> None:
        for kept in self._kept.values():
            kept.__exit__(None, None, None)

    def of(self, name: str, shapes: Sequence[tuple[int, int, int]], dtype: torch.dtype) -> Activations:
        """Return the place for a linear's inputs, the same for every layer."""
        if name not in self._kept:
            self._kept[name] = Activations(shapes, dtype, self._left, self._folder)
            if self._left is not None and not self._kept[name].on_disk:
                self._left -= self._kept[name].nbytes
        return self._kept[name]


class OriginalInputs:
    """What some linears of a 16-bit layer read where the layers before it are in 16 bit, too.

    Kept in ``caches``, as what the rounded model's linears read, of one layer at a time.
    """

    def __init__(self, caches: Caches, names: Sequence[str]) -> None:
        self._caches = caches
        self._names = names
        self._kept: dict[str, Activations] = {}

    @contextlib.contextmanager
    def keeping(self, layer: nn.Module, shapes: Sequence[tuple[int, int, int]], dtype: torch.dtype) -> Iterator[None]:
        """Keep, in ``dtype``, what a layer's linears read while it runs over all batches, B × L × D, in order."""
        with contextlib.ExitStack() as hooks:
            for name in self._names:
                linear: Any = layer.get_submodule(name)
                wide = [(rows, length, linear.in_features) for rows, length, _ in shapes]
                kept = self._kept[name] = self._caches.of(f"16-bit {name}", wide, dtype)
                handle = linear.register_forward_pre_hook(_keeper(kept))
                hooks.callback(handle.remove)
            yield

    def of(self, name: str, number: int) -> Tensor:
        """Return what a linear read in a batch, T × C."""
        return self._kept[name][number].flatten(0, 1)


def _keeper(kept: Activations) -> Any:
    numbers = iter(range(len(kept)))

    def keep(_: nn.Module, given: tuple[Any, ...]) -> None:
        kept[next(numbers)].copy_(given[0])

    return keep
