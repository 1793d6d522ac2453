"""What every runner does with its resources: takes them when it is entered, gives them back whatever happened."""

from __future__ import annotations

import abc
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Activated"]


class Activated(abc.ABC):
    """A context manager that holds a runtime's resources while it is entered.

    A subclass fills in :meth:`_activate` and, where it holds something, :meth:`_deactivate`.
    """

    def __init__(self) -> None:
        self._active = False

    def __enter__(self) -> Self:
        self.activate()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.deactivate()

    def activate(self) -> None:
        """Load the model; what was taken is given back when that fails. Twice is the same as once."""
        if self._active:
            return
        try:
            self._activate()
        except BaseException:
            self._deactivate()
            raise
        self._active = True

    def deactivate(self) -> None:
        """Give everything back; nothing happens where nothing is held."""
        self._active = False
        self._deactivate()

    @abc.abstractmethod
    def _activate(self) -> None: ...

    def _deactivate(self) -> None:
        return None
