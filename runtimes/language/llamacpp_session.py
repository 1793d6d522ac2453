"""One llama.cpp for several runners: loaded for the first of them, given back with the last."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from runtimes.guard.activation import Activated
from runtimes.language.llamacpp import LlamaCpp

__all__ = ["LlamaSession"]


class LlamaSession(Activated):
    """What ``load`` makes, loaded while entered; guard and language runner may share it.

    Calls may share what is loaded, and take turns at its parts; see :class:`LlamaCpp`. Raises those of loading.
    """

    exclusive = False

    def __init__(self, load: Callable[[], LlamaCpp]) -> None:
        super().__init__()
        self._load = load
        self._loaded: LlamaCpp | None = None
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
        self._loaded = self._frees.enter_context(self._load())

    def _deactivate(self) -> None:
        self._loaded = None

    @contextmanager
    def using(self) -> Iterator[LlamaCpp]:
        """Hold what is loaded for a call; SafeVLMError when it is not active."""
        with self._call():
            yield self._held(self._loaded)

    @contextmanager
    def prompting(self) -> Iterator[LlamaCpp]:
        """Hold what is loaded and the prompt in memory for a call; BusyError while another call has the prompt."""
        with self.using() as llama, llama.memory.taken():
            yield llama
