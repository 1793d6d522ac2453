"""Count the forward passes of a Safe-VLM's parts."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from torch import Tensor, nn

from safevlm.network.safe_vlm import SafeVLM


class Passes:
    """While entered: how often vision tower, decoder layers and guard head ran.

    ``layers`` has the sequence lengths that each decoder layer was given, in order: the prefill's, then ones.
    """

    def __init__(self, vlm: SafeVLM) -> None:
        self._vlm = vlm
        self._hooks: list[Any] = []
        self.tower = self.head = 0
        self.layers: list[list[int]] = []

    def __enter__(self) -> Passes:
        core = self._vlm.core
        tower: nn.Module = getattr(core, "visual", None) or core.vision_tower
        self._hooks = [
            tower.register_forward_hook(self._saw_tower),
            self._vlm.head.register_forward_hook(self._saw_head),
        ]
        for layer in core.language_model.layers:
            lengths: list[int] = []
            self.layers.append(lengths)
            self._hooks.append(layer.register_forward_pre_hook(lambda _module, given, seen=lengths: _note(given, seen)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    @property
    def prefills(self) -> int:
        """Passes over more than one position; every layer ran as often as the others."""
        assert all(lengths == self.layers[0] for lengths in self.layers)
        return sum(length > 1 for length in self.layers[0])

    @property
    def decodes(self) -> int:
        """Passes over one position."""
        assert all(lengths == self.layers[0] for lengths in self.layers)
        return sum(length == 1 for length in self.layers[0])

    def _saw_tower(self, *_: Any) -> None:
        self.tower += 1

    def _saw_head(self, *_: Any) -> None:
        self.head += 1


def _note(given: tuple[Tensor, ...], seen: list[int]) -> None:
    seen.append(given[0].shape[1])
