"""What every runner does with its resources: takes them when it is entered, gives them back whatever happened.

A verdict belongs to its image. So a runner runs one call at a time unless its class states that a call leaves nothing
behind for the next one; a second call is refused at once, and never waits for one that may hang. What a running call
works on is not freed under it: a runner that is deactivated meanwhile leaves it to that call, which frees it when it
ends, and activating again takes new resources.
"""

from __future__ import annotations

import abc
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, ClassVar, TypeVar

from runtimes.gate.lane import seconds_left
from safevlm.errors import BusyError, SafeVLMError

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Activated", "Turn"]

T = TypeVar("T")

_log = logging.getLogger(__name__)


class Activated(abc.ABC):
    """A context manager that holds a runtime's resources while it is entered.

    A subclass fills in :meth:`_activate` and, where it holds something, :meth:`_deactivate`, which lets go of it. What
    must be freed, and not only forgotten, is registered with ``self._frees.callback(free)`` as it is taken: that is
    called once no call uses it any more. A call takes what it works on when it begins, with :meth:`_held`, into local
    names: another activation may replace the runner's attributes before it ends.
    """

    exclusive: ClassVar[bool] = True
    """Whether one call at a time may run. False states that a call shares nothing with another one: no buffers, no
    context, no stream, no cache, no counter."""

    def __init__(self) -> None:
        self._frees = ExitStack()
        self._activation: _Activation | None = None
        self._entered = threading.local()

    def __enter__(self) -> Self:
        self.activate()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.deactivate()

    def activate(self) -> None:
        """Load the model; what was taken is given back when that fails. Twice is the same as once."""
        if self._activation is not None:
            return
        self._frees = ExitStack()
        with ExitStack() as taken:
            taken.callback(self._frees.close)
            taken.callback(self._deactivate)
            self._activate()
            taken.pop_all()
        self._activation = _Activation(type(self).__name__, self.exclusive, self._frees)

    def deactivate(self) -> None:
        """Give everything back, now or when the call that still runs ends; nothing happens where nothing is held."""
        activation, self._activation = self._activation, None
        try:
            self._deactivate()
        finally:
            if activation is not None:
                activation.end()

    @abc.abstractmethod
    def _activate(self) -> None: ...

    def _deactivate(self) -> None:
        """Forget what is held. Free nothing here: a call may still run on it."""
        return

    def _check_active(self) -> _Activation:
        if self._activation is None:
            raise _not_active(type(self).__name__)
        return self._activation

    @contextmanager
    def _call(self) -> Iterator[None]:
        """Hold the resources for a call.

        Raises SafeVLMError when they are not held, or no longer after the call; BusyError when it must not run now.
        """
        activation = self._check_active()
        with activation.call():
            self._entered.activation = activation
            yield
        if self._activation is not activation:
            raise SafeVLMError(f"{type(self).__name__} was deactivated during the call: its answer is not used")

    def _held(self, resource: T | None) -> T:
        """Return what the runner holds, for the call that begins in this thread.

        Raises SafeVLMError when the runner was deactivated at this very moment, whether or not it is active again.
        """
        if resource is None or self._activation is not getattr(self._entered, "activation", None):
            raise _not_active(type(self).__name__)
        return resource


class _Activation:
    """One activation's resources and the calls that use them: whoever leaves last, runner or call, frees them."""

    def __init__(self, name: str, exclusive: bool, frees: ExitStack) -> None:
        self._name, self._exclusive, self._frees = name, exclusive, frees
        self._lock = threading.Lock()
        self._calls = 0
        self._ended = False

    @contextmanager
    def call(self) -> Iterator[None]:
        with self._lock:
            if self._ended:
                raise _not_active(self._name)
            if self._exclusive and self._calls:
                raise _busy(self._name)
            self._calls += 1
        try:
            yield
        finally:
            with self._lock:
                self._calls -= 1
                last = self._ended and self._calls == 0
            if last:
                _log.info("%s: the last call has ended, what it used is freed", self._name)
                self._frees.close()

    def end(self) -> None:
        with self._lock:
            self._ended = True
            running = self._calls > 0
        if running:
            _log.warning("%s: a call is still running; what it uses is freed when it ends", self._name)
        else:
            self._frees.close()


class Turn:
    """A part of a runtime that several runners share and one call at a time may use.

    Calls of lanes wait for each other, as long as both their deadlines allow; any other call is refused at once.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._until = 0.0

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Hold it; BusyError when another call does."""
        left = seconds_left()
        if not self._lock.acquire(timeout=max(0.0, min(left, self._until - time.monotonic()))):
            raise _busy(self._name)
        try:
            self._until = time.monotonic() + left
            yield
        finally:
            self._until = 0.0
            self._lock.release()


def _busy(name: str) -> BusyError:
    return BusyError(
        f"{name} is busy with an earlier call, which may hang; this call is refused. Try again when that one has "
        "ended; if it never does, restart the process."
    )


def _not_active(name: str) -> SafeVLMError:
    return SafeVLMError(f"{name} is not active: enter it with `with` or activate()")
