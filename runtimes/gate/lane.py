"""Run calls that may hang: each in a daemon thread, with a deadline, one at a time.

Python cannot end a thread. A call that overruns its deadline is left behind in its thread, its result dropped, and
the next call gets a new thread; a daemon thread does not keep the interpreter from exiting. The runner that it left
behind in there refuses other calls until it ends (``runtimes.guard.activation``).
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from safevlm.errors import SafeVLMError

__all__ = ["MOST_STUCK", "Lane", "Outcome", "OverranError", "WaitedError", "seconds_left"]

MOST_STUCK = 8
"""Calls left behind at once, beyond which a lane refuses to start another: each holds a thread and its memory."""

T = TypeVar("T")
_running = threading.local()


def seconds_left() -> float:
    """Return how many seconds the lane's call that runs in this thread has left; 0 outside of a lane."""
    return max(0.0, getattr(_running, "until", 0.0) - time.monotonic())


class OverranError(SafeVLMError):
    """A call did not end by its deadline, or could not be begun before it."""


class WaitedError(OverranError):
    """A call could not be begun: others held the lane all its time."""


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What a call returned, or what it raised (of any kind), after how many seconds."""

    value: T | None
    error: BaseException | None
    seconds: float

    def get(self) -> T:
        """Return the value. What was raised is raised again, SystemExit and its like as SafeVLMError."""
        if self.error is None:
            return self.value  # type: ignore[return-value]  # T may itself be None
        if isinstance(self.error, Exception):
            raise self.error
        raise SafeVLMError(f"{type(self.error).__name__}: {self.error}") from self.error


class _Job:
    def __init__(self, call: Callable[[], Any], seconds: float) -> None:
        self.call = call
        self.until = time.monotonic() + seconds
        self.done = threading.Event()
        self.value: Any = None
        self.error: BaseException | None = None


class _Worker:
    """A thread that takes jobs until it is told to end."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, name=name, daemon=True)
        self.thread.start()

    def start(self, job: _Job) -> None:
        self._jobs.put(job)

    def end(self) -> None:
        """Let the thread end after the job it is at, if any."""
        self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            _running.until = job.until
            try:
                job.value = job.call()
            except BaseException as error:  # handed to the caller: a dead thread would read as a hung call
                job.error = error
            job.done.set()
            del job  # or a result would live until the next call


class Lane:
    """One call at a time; see the module's text. ``name`` stands in messages and thread names."""

    def __init__(self, name: str, *, most_stuck: int = MOST_STUCK) -> None:
        self.name = name
        self.most_stuck = most_stuck
        self._turn = threading.Lock()
        self._worker: _Worker | None = None
        self._left_behind: list[_Worker] = []

    @property
    def stuck(self) -> int:
        """How many calls that overran are still running."""
        self._left_behind = [worker for worker in self._left_behind if worker.thread.is_alive()]
        return len(self._left_behind)

    @contextmanager
    def turn(self, seconds: float) -> Iterator[float]:
        """Hold the lane for several calls, and tell how many of the seconds are left after waiting for it.

        Raises OverranError when another caller holds it all that time, or too many calls are stuck.
        """
        begun = time.perf_counter()
        if not self._turn.acquire(timeout=seconds):
            raise WaitedError(f"the {self.name} was busy with other requests for {seconds:g} s")
        try:
            if self.stuck >= self.most_stuck:
                raise OverranError(
                    f"{self.stuck} calls of the {self.name} hang. No more calls start until one of them ends"
                )
            yield max(0.0, seconds - (time.perf_counter() - begun))
        finally:
            self._turn.release()

    def run(self, call: Callable[[], T], seconds: float) -> Outcome[T]:
        """Call within a :meth:`turn`, and wait so many seconds for it; its error is in the outcome, too."""
        if self._worker is None or not self._worker.thread.is_alive():  # a fork has the object, not the thread
            self._worker = _Worker(f"gate {self.name}")
        job, begun = _Job(call, seconds), time.perf_counter()
        self._worker.start(job)
        try:
            job.done.wait(seconds)
        finally:
            if not job.done.is_set():
                self._leave_behind()
        took = time.perf_counter() - begun
        if not job.done.is_set():
            return Outcome(None, OverranError(f"the {self.name} gave no answer within {seconds:.3g} s"), took)
        return Outcome(job.value, job.error, took)

    def close(self) -> None:
        """Let the waiting thread end."""
        if self._worker is not None:
            self._worker.end()
            self._worker = None

    def _leave_behind(self) -> None:
        assert self._worker is not None
        self._worker.end()
        self._left_behind.append(self._worker)
        self._worker = None
