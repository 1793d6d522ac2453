"""Decoding in processes that can be killed: an image that takes too long or too much ends its process and nothing else.

A pool of our own rather than ``concurrent.futures`` or ``pebble``: those take one deadline or none, kill all of their
processes or by a process that is forked beside running threads, and pickle what comes back, so that an image which
takes over its decoder could run code here.

Every process belongs to one thread, which starts it, waits for it and replaces it. There are as many images at work as
there are lanes; one that has taken :data:`SHORT` leaves its lane to others if few of that kind are at work, and is
otherwise given up as soon as somebody waits: images that are slow to decode do not keep those that are quick waiting.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from runtimes.gateway.images.decoder import DecoderSettings
from runtimes.gateway.refusal import Refusal, bad_request, guard_error, overloaded
from safevlm.errors import SafeVLMError
from safevlm.machine import core_count

__all__ = ["Decoded", "Decoders"]

_log = logging.getLogger(__name__)
SHORT = 1.0
"""Seconds after which an image counts as slow."""
STARTING = 120.0
ENDING = 5.0
"""Seconds within which a process that has closed its socket must end, so that its end can be reported."""
PATIENCE = 4
"""Allowed wall-clock time of an image, as a multiple of its processor time, because other work may slow it down."""
KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR", "PYTHONHOME", "PYTHONPATH")
"""Environment variables passed to decoders; keys and passwords are not."""
START = (
    "import sys; sys.path[:] = {path!r}; "
    "from safevlm.imports.siblings import put_ours_first; put_ours_first(); "
    "from runtimes.gateway.images.decoder import serve; serve({parent})"
)  # fmt: skip

Ended = Literal["slow", "given up"]


@dataclass(frozen=True, eq=False)
class Decoded:
    """An image as it may be shown: ``url`` holds the file that was judged, a PNG or JPEG.

    ``pixels``, uint8 N x H x W x 3, are what is judged: the first ``own`` of that file, the rest of what other readers
    show of the file that came. ``image`` is the file's, where it was asked for.
    """

    url: str
    names: tuple[str, ...]
    pixels: npt.NDArray[np.uint8]
    own: int
    image: Image.Image | None

    def name(self, at: int) -> str | None:
        """Return the name of a view or tile, None where there is only one."""
        return self.names[at] if len(self.names) > 1 else None

    def is_hidden(self, at: int) -> bool:
        """Say whether pixels are of a view that is not the usual one: not of what is shown."""
        return at >= self.own

    @property
    def size(self) -> int:
        """Pixels that are held."""
        return self.pixels.size // 3 + (0 if self.image is None else self.image.width * self.image.height)


class Decoders:
    """The processes; an asynchronous context manager, for one event loop. ``most`` images may wait."""

    def __init__(self, settings: DecoderSettings, most: int) -> None:
        self.settings, self.most = settings, most
        lanes = max(2, min(8, core_count()))
        self._slow_most = max(1, lanes // 4)
        self._processes = [_Process(settings) for _ in range(lanes + self._slow_most)]
        self._idle = deque(self._processes)
        self._lanes = asyncio.Semaphore(lanes)
        self._lane_count = lanes
        self._waiting = self._slow = 0

    async def __aenter__(self) -> Decoders:
        """Start as many as there are lanes. Raises SafeVLMError where one does not start."""
        loop = asyncio.get_running_loop()
        first = self._processes[: self._lane_count]
        try:
            await asyncio.gather(*(loop.run_in_executor(each.thread, each.start) for each in first))
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        for each in self._processes:
            each.close()
        await asyncio.gather(*(asyncio.to_thread(each.thread.shutdown) for each in self._processes))

    async def decode(self, content: bytes, where: str) -> Decoded:
        """Decode an image and encode it again. Raises Refusal."""
        if self._waiting >= self.most:
            raise overloaded(f"{self.most} images are waiting to be decoded. Try again in a second.")
        self._waiting += 1
        try:
            await self._lanes.acquire()
        finally:
            self._waiting -= 1
        job = _Job(self, self._idle.pop(), content)
        try:
            found = await asyncio.shield(job.running)
        except asyncio.CancelledError:
            job.leave()
            raise
        if isinstance(found, _Failure):
            raise found.refusal(where)
        return found


class _Job:
    """An image at work in a process. It frees its lane when it ends, or earlier if it is slow."""

    def __init__(self, pool: Decoders, process: _Process, content: bytes) -> None:
        self._loop = asyncio.get_running_loop()
        self.pool, self.process = pool, process
        self._is_wanted = True
        self._is_slow = False
        self._timers: list[asyncio.TimerHandle] = []
        self.running = self._loop.run_in_executor(process.thread, self._work, content)
        self.running.add_done_callback(self._ended)

    def _work(self, content: bytes) -> Decoded | _Failure:
        """Decode in the process's thread; time counts once the process is there."""
        self.process.make_ready()
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._begin)
        return self.process.ask(content)

    def _begin(self) -> None:
        if not self.running.done():
            allowed = PATIENCE * self.pool.settings.seconds
            self._timers = [
                self._loop.call_later(SHORT, self._turns_slow),
                self._loop.call_later(allowed, self.process.kill, "slow"),
            ]

    def leave(self) -> None:
        """Say that nobody waits for it any more: it is ended, unless it is about to end anyhow."""
        self._is_wanted = False
        if self._is_slow:
            self.process.kill("given up")

    def _turns_slow(self) -> None:
        if not self._is_wanted:
            self.process.kill("given up")
        elif self.pool._slow < self.pool._slow_most:
            self.pool._slow += 1
            self._is_slow = True
            self.pool._lanes.release()
        elif self.pool._waiting:
            self.process.kill("given up")
        else:
            self._timers[0] = self._loop.call_later(SHORT, self._turns_slow)

    def _ended(self, _: object) -> None:
        for timer in self._timers:
            timer.cancel()
        if self.process.is_alive:
            self.pool._idle.append(self.process)
        else:
            self.process.restart()
            self.pool._idle.appendleft(self.process)  # the others are ready
        if self._is_slow:
            self.pool._slow -= 1
        else:
            self.pool._lanes.release()


@dataclass(frozen=True)
class _Failure:
    """Why there is no image."""

    code: str
    reason: str = ""

    def refusal(self, where: str) -> Refusal:
        if self.code == "overloaded":
            return overloaded("too many slow images are being decoded. Try again in a second.")
        if self.code == "guard_unavailable":
            return guard_error(
                "images cannot be decoded at the moment, so the request was not answered. Try again in a second."
            )
        return bad_request(f"{where}: {self.reason}", code=self.code, param=where)


TOO_LARGE = _Failure("image_too_large", "decoding it takes more memory than allowed. Make it smaller.")
TOO_SLOW = _Failure(
    "image_too_slow", "decoding it takes longer than allowed. Make it smaller, or save it as a plain PNG or JPEG."
)
UNAVAILABLE = _Failure("guard_unavailable")
UNREADABLE = _Failure("invalid_image", "it is damaged, and decoding it failed. Save it as a plain PNG or JPEG.")


class _Process:
    """One process and the thread it belongs to; all but ``kill`` and ``close`` happen in that thread."""

    def __init__(self, settings: DecoderSettings) -> None:
        self.settings = settings
        self.thread = ThreadPoolExecutor(1, "gateway decoder")
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: Connection | None = None
        self._killed: Ended | None = None
        self._is_closed = False

    @property
    def is_alive(self) -> bool:
        return self._process is not None and self._killed is None

    def start(self) -> None:
        """Start it and wait until it has imported what it needs. Raises SafeVLMError."""
        if self._is_closed:
            raise SafeVLMError("the image decoders have ended.")
        self._end()
        ours, theirs = socket.socketpair()
        environment = {name: os.environ[name] for name in KEPT if name in os.environ}
        path = [each or os.getcwd() for each in sys.path]  # noqa: PTH109
        code = START.format(path=path, parent=os.getpid())
        self._killed = None
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env={**environment, "OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
                start_new_session=True,
            )
        self._socket = Connection(ours.detach())
        if self._is_closed:  # meanwhile
            self._end()
            raise SafeVLMError("the image decoders have ended.")
        try:
            self._socket.send_bytes(self.settings.packed())
            if self._socket.poll(STARTING):
                self._socket.recv_bytes()
                return
        except (OSError, EOFError):
            raise SafeVLMError(f"an image decoder did not start: it {self._end(ENDING)}.") from None
        self._end()
        raise SafeVLMError(f"an image decoder did not start in {STARTING:.0f} s.")

    def restart(self) -> None:
        """Start it anew in its thread; where that fails, the next image tries."""
        if not self._is_closed:
            self.thread.submit(self._start_again)

    def make_ready(self) -> None:
        """Start it anew if it has ended; where that fails, :meth:`ask` says so."""
        if not self.is_alive or (self._process is not None and self._process.poll() is not None):
            self._start_again()

    def ask(self, content: bytes) -> Decoded | _Failure:
        """Return the image in some bytes, or why there is none."""
        if self._socket is None:
            return UNAVAILABLE
        try:
            self._socket.send_bytes(content)
            return self._read(self._socket)
        except (EOFError, OSError):
            return self._failure(self._end(ENDING))
        except Exception as error:  # of any kind: an image may have taken over what speaks here
            _log.warning("an image decoder sent an invalid reply: %s", type(error).__name__)
            self._end()
            return UNREADABLE

    def kill(self, reason: Ended) -> None:
        """End what it does, for a reason that the next answer tells."""
        process = self._process
        if process is not None and self._killed is None:
            self._killed = reason
            process.kill()

    def close(self) -> None:
        """End it and its thread, soon."""
        self._is_closed = True
        self.kill("given up")
        self.thread.submit(self._end)
        self.thread.shutdown(wait=False)

    def _start_again(self) -> None:
        try:
            self.start()
        except (SafeVLMError, OSError) as error:
            _log.error("an image decoder cannot be started: %s", error)

    def _read(self, given: Connection) -> Decoded | _Failure:
        most = self.settings.memory
        told = json.loads(given.recv_bytes(most))
        if "code" in told:
            if "fault" in told:
                _log.warning("an image decoder failed: %s", told["fault"])
            return _told_failure(told)
        content, size = given.recv_bytes(most), self.settings.preprocessing
        pixels = np.frombuffer(given.recv_bytes(most), np.uint8).reshape(len(told["names"]), size.height, size.width, 3)
        image = None
        if self.settings.with_image:
            image = Image.frombytes("RGB", tuple(told["size"]), given.recv_bytes(most))
        url = f"data:{told['kind']};base64,{base64.b64encode(content).decode('ascii')}"
        return Decoded(url, tuple(told["names"]), pixels, told["own"], image)

    def _failure(self, ended: str) -> _Failure:
        reason = self._killed
        if reason == "given up":
            return _Failure("overloaded")
        _log.warning("an image decoder %s", ended)
        if reason == "slow" or ended == _killed_by(signal.SIGPROF):
            return TOO_SLOW
        return TOO_LARGE if ended == _killed_by(signal.SIGKILL) else UNREADABLE  # what the system kills, it kills so

    def _end(self, wait: float = 0) -> str:
        """End the process, if it does not by itself in so many seconds, and return how it ended."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._process is None:
            return "was missing"
        try:
            code = self._process.wait(wait)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._process = None
        return _killed_by(-code) if code < 0 else f"ended with code {code}"


def _killed_by(number: int) -> str:
    return f"was killed by signal {number}"


def _told_failure(told: dict[str, str]) -> _Failure:
    if told["code"] == "image_too_large":
        return TOO_LARGE
    if "reason" not in told:
        return UNREADABLE
    return _Failure(told["code"], told["reason"].removeprefix("the given bytes: "))
