"""The guard on torch: the untouched path of a checkpoint, which every export is compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from runtimes.guard.bundle import Bundle
from runtimes.guard.runner import GuardOutput, GuardRunner
from safevlm.errors import MissingExtraError

if TYPE_CHECKING:
    from safevlm.network.reference import GuardModel

__all__ = ["TorchRunner", "open_source"]


class TorchRunner(GuardRunner):
    """Run a checkpoint (not a bundle) through ``safevlm.network.reference`` in float32 on the CPU.

    ``checkpoint`` is an opened checkpoint; ``grid`` the fixed (height, width) of a Qwen2.5-VL tower.
    """

    runtime = "torch"

    def __init__(self, checkpoint: Any, *, grid: tuple[int, int] | None = None, threads: int | None = None) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        self.grid = grid
        self.threads = threads
        self._guard: GuardModel | None = None

    def _activate(self) -> None:
        try:
            import torch
        except ImportError as error:
            raise MissingExtraError("torch", "torch", "judging with the untouched torch path") from error
        from safevlm.network.reference import build_reference_guard

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        guard = build_reference_guard(self.checkpoint, grid=self.grid)
        self.preprocessing = guard.preprocessing
        self._guard = guard.eval()

    def _deactivate(self) -> None:
        self._guard = None

    def _run(self, rgb: npt.NDArray[np.uint8]) -> GuardOutput:
        import torch

        guard = self._held(self._guard)
        with torch.inference_mode():
            probs, logits = guard(torch.from_numpy(rgb.copy()))
        return GuardOutput(probs=probs.numpy(), logits=logits.numpy())


def open_source(bundle: Bundle) -> Any:
    """Open the checkpoint that a bundle was made from, by the name, revision and tap in its manifest."""
    from safevlm.checkpoint.checkpoint import open_checkpoint

    source = bundle.manifest.source
    return open_checkpoint(source.checkpoint, tap=bundle.manifest.tap.source, revision=source.revision)
