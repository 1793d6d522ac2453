"""One guard for many requests: images that come in together are judged in one call.

Shapes: N images, H × W pixels, C classes.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from runtimes.gate.lane import Lane
from runtimes.gateway.options import GatewayOptions
from runtimes.gateway.refusal import guard_error, overloaded
from runtimes.gateway.serving.metrics import Metrics
from runtimes.guard.runner import GuardRunner
from safevlm.errors import BusyError, SafeVLMError

__all__ = ["Batching"]

_log = logging.getLogger(__name__)
ENDING_SECONDS = 5.0
Pixels = npt.NDArray[np.uint8]
Row = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class _Waiting:
    pixels: Pixels
    answer: asyncio.Future[Row]
    since: float


class Batching:
    """A bounded queue before a guard's runner, which runs in a thread of its own under a deadline.

    An asynchronous context manager, for one event loop; the runner is active already.
    """

    def __init__(self, runner: GuardRunner, options: GatewayOptions, metrics: Metrics) -> None:
        self.runner, self.options, self.metrics = runner, options, metrics
        self.lane = Lane("guard")
        self._queue: asyncio.Queue[_Waiting] = asyncio.Queue(options.queue)
        self._thread = ThreadPoolExecutor(1, "gateway guard")
        self._running: concurrent.futures.Future[list[Row | Exception]] | None = None
        self._task: asyncio.Task[None] | None = None
        self.coming = 0
        """Images that are being fetched or decoded: only while there are some is it worth to wait for more."""

    async def __aenter__(self) -> Batching:
        self._task = asyncio.create_task(self._work())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._thread.shutdown(wait=False)
        if self._running is not None:
            await asyncio.to_thread(concurrent.futures.wait, [self._running], ENDING_SECONDS)
        if not self.busy:
            self.lane.close()

    @property
    def busy(self) -> bool:
        """Whether the guard is being asked just now, or hangs."""
        return self.lane.stuck > 0 or (self._running is not None and not self._running.done())

    @property
    def working(self) -> bool:
        """Whether the guard can be asked: a worker that has ended would leave everybody waiting."""
        return self._task is not None and not self._task.done() and not self.lane.stuck

    async def judge(self, pixels: Pixels) -> Row:
        """Return C probabilities of one image at the contract's size.

        Raises Refusal when too many wait, the guard fails, or its time is over.
        """
        waiting = _Waiting(pixels, asyncio.get_running_loop().create_future(), time.perf_counter())
        try:
            self._queue.put_nowait(waiting)
        except asyncio.QueueFull:
            raise overloaded(f"{self.options.queue} images are waiting for the guard. Try again in a second.") from None
        self.metrics.queue.set(self._queue.qsize())
        try:
            return await asyncio.wait_for(waiting.answer, self.options.guard_timeout)
        except asyncio.TimeoutError:
            raise guard_error("the guard gave no verdict in time, so the request was not answered.") from None

    async def _work(self) -> None:
        while True:
            batch = [await self._queue.get()]
            await self._fill(batch)
            self.metrics.queue.set(self._queue.qsize())
            batch = [each for each in batch if not each.answer.done()]  # whose client gave up is not judged
            now = time.perf_counter()
            for each in batch:
                self.metrics.waited.observe(now - each.since)
            if batch:
                self._running = self._thread.submit(self._judge, [each.pixels for each in batch])
                found = await asyncio.wrap_future(self._running)
                for waiting, row in zip(batch, found, strict=True):
                    _settle(waiting.answer, row)

    async def _fill(self, batch: list[_Waiting]) -> None:
        """Add what is there, and what comes in within the time that is waited for images on their way."""
        loop = asyncio.get_running_loop()
        until = loop.time() + self.options.batch_wait
        with contextlib.suppress(asyncio.QueueEmpty, asyncio.TimeoutError):
            while len(batch) < self.options.batch:
                left = until - loop.time()
                waits = left > 0 and self.coming > 0 and self._queue.empty()
                batch.append(await asyncio.wait_for(self._queue.get(), left) if waits else self._queue.get_nowait())

    def _judge(self, pictures: list[Pixels]) -> list[Row | Exception]:
        """Judge in one call; a batch that fails is judged one by one, so that one image spoils no other."""
        self.metrics.batch.observe(len(pictures))
        try:
            with self.metrics.guard.time(), self.lane.turn(self.options.guard_timeout) as left:
                output = self.lane.run(lambda: self.runner.infer(np.stack(pictures)), left).get()
            if len(output.probs) != len(pictures):
                raise SafeVLMError(f"the guard gave {len(output.probs)} rows for {len(pictures)} images")
            return list(output.probs)
        except Exception as error:  # of any kind: it fails closed, and the server goes on
            if len(pictures) == 1 or self.lane.stuck or isinstance(error, BusyError):
                _log.error("the guard failed: %s", type(error).__name__, exc_info=not isinstance(error, SafeVLMError))
                return [error] * len(pictures)
        return [row for picture in pictures for row in self._judge([picture])]


def _settle(answer: asyncio.Future[Row], row: Row | Exception) -> None:
    if answer.done():
        return
    if isinstance(row, BusyError):
        answer.set_exception(
            guard_error(
                "the guard is busy with an earlier image, so the request was not answered. Try again in a second."
            )
        )
    elif isinstance(row, Exception):
        answer.set_exception(guard_error("the guard failed, so the request was not answered."))
    else:
        answer.set_result(row)
