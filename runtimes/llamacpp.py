"""llama.cpp through llama-cpp-python's own C bindings: a language model and its projector, for several runners.

The high-level chat handlers tokenise and prefill by themselves and keep hidden states to themselves; the guard needs
those of the image tokens, out of the very prefill that answers. So this project speaks to ``llama.h`` and ``mtmd.h``.

Shapes: H × W pixels, T image tokens, D width of the language model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from models.machine import core_count
from runtimes.activation import Activated
from runtimes.llamacpp_loaded import LlamaSettings, LoadedLlama

__all__ = ["LlamaCpp"]


class LlamaCpp(Activated):
    """A model and its projector, loaded while entered; guard and language runner may share it.

    ``context`` is how many tokens a prompt with its answer may have; ``gpu_layers`` are offloaded where the build can.
    ``class_token_last``: the projector file is written for a graph with LLaVA's class token behind the patches.
    Calls share what is loaded, and take turns at its parts: one prompt is in memory at a time, images may be encoded
    meanwhile. Errors: BundleError when llama.cpp cannot load a file.
    """

    exclusive = False

    def __init__(
        self,
        model: Path,
        mmproj: Path,
        *,
        image_tokens: int,
        class_token_last: bool = False,
        context: int = 4096,
        threads: int | None = None,
        gpu_layers: int = 0,
    ) -> None:
        super().__init__()
        self.settings = LlamaSettings(
            model=model,
            mmproj=mmproj,
            image_tokens=image_tokens,
            class_token_last=class_token_last,
            context=context,
            threads=threads or core_count(),
            gpu_layers=gpu_layers,
        )
        self._loaded: LoadedLlama | None = None
        self._users = 0

    def activate(self) -> None:
        """Load it for the first of its users."""
        super().activate()
        self._users += 1

    def deactivate(self) -> None:
        """Give it back with the last of its users."""
        self._users = max(0, self._users - 1)
        if self._users == 0:
            super().deactivate()

    def _activate(self) -> None:
        loaded = LoadedLlama(self.settings)
        self._frees.callback(loaded.free)
        loaded.load()
        self._loaded = loaded

    def _deactivate(self) -> None:
        self._loaded = None

    @contextmanager
    def using(self) -> Iterator[LoadedLlama]:
        """Hold what is loaded for a call; SafeVLMError when it is not active."""
        with self._call():
            yield self._held(self._loaded)

    @contextmanager
    def prompting(self) -> Iterator[LoadedLlama]:
        """Hold what is loaded and the prompt in memory for a call; BusyError while another call has the prompt."""
        with self.using() as llama, llama.memory.taken():
            yield llama

    def encode(self, rgb_HWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Return the projector's output, T × D, of a picture at the contract's size."""
        with self.using() as llama:
            return llama.encode(rgb_HWC)
