"""Images are decoded in processes that can be ended: one that takes too long or too much memory costs its own request.

A thread waits for each process; the event loop waits for none. Pools of well-kept libraries (pebble, loky, those of the
standard library) send pickles back, which whoever takes a decoder over could fill with code, and count seconds on the
wall, by which a busy machine would refuse good images.

Shapes: V views of an image with their tiles, H x W pixels.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import queue
import select
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from models.errors import SafeVLMError
from models.preprocessing import Preprocessing
from runtimes.gateway.options import GatewayOptions
from runtimes.gateway.refusal import Refusal, bad_request, overloaded

__all__ = ["Decoded", "Decoding"]

BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from runtimes.gateway.decoder import main; main()"
POLL_SECONDS = 0.05
START_SECONDS = 600.0
GONE_SECONDS = 1.0
"""What a process gets to be done with an image whose client has left: to start another takes as long."""
MAX_LINE = 1 << 20
PIECE = 1 << 20


@dataclass(frozen=True, eq=False)
class Decoded:
    """An image as it goes on: its file (``content`` of media type ``kind``), and what of it the guard has to judge.

    ``pixels`` are V x H x W x 3, uint8; the first ``own`` of them are read from that very file, the others are further
    views of the client's.
    """

    content: bytes
    kind: str
    names: tuple[str, ...]
    pixels: npt.NDArray[np.uint8]
    own: int


class _Ended(Exception):  # noqa: N818  # control flow
    """The process has ended, or was."""


class Decoding:
    """A pool of decoding processes; an asynchronous context manager. They are ready once it is entered."""

    def __init__(self, preprocessing: Preprocessing, mode: str, options: GatewayOptions) -> None:
        self.options = options
        self.settings = {
            "preprocessing": preprocessing.model_dump(mode="json"),
            "mode": mode,
            "memory": options.decode_memory,
            "seconds": options.decode_timeout,
            "max_pixels": options.max_pixels,
            "formats": list(options.formats),
        }
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(options.decoders, "gateway decoder")
        self._processes: set[_Process] = set()
        self._waiting = 0
        self._closed = False

    async def __aenter__(self) -> Decoding:
        started = [_Process(self.settings) for _ in range(self.options.decoders)]
        self._processes.update(started)
        try:
            for each in started:
                await asyncio.to_thread(each.wait)
                self._idle.put(each)
        except _Ended:
            await self.__aexit__()
            raise SafeVLMError("the processes that decode images do not start.") from None
        return self

    async def __aexit__(self, *_: object) -> None:
        self._closed = True
        for each in list(self._processes):
            each.end()
        await asyncio.to_thread(self._threads.shutdown, wait=True, cancel_futures=True)

    async def decode(self, content: bytes, where: str) -> Decoded:
        """Decode a file. Raises Refusal: 400 for what is no image or too much of one, 503 when too many wait."""
        if self._waiting >= self.options.queue + self.options.decoders:
            raise overloaded(f"{self.options.queue} images wait to be decoded; try again in a second.")
        self._waiting += 1
        gone = threading.Event()
        try:
            answer, found = await asyncio.get_running_loop().run_in_executor(self._threads, self._decode, content, gone)
        finally:
            gone.set()
            self._waiting -= 1
        if found is None:
            raise self._refusal(answer, where)
        return found

    def _decode(self, content: bytes, gone: threading.Event) -> tuple[dict[str, Any], Decoded | None]:
        """Have a process decode a file, unless its client is gone; a process that does not is replaced."""
        if gone.is_set():
            return {"refused": "gone"}, None
        process = self._idle.get()
        try:
            return process.decode(content, time.monotonic() + self.options.guard_timeout, gone)
        except _Ended:
            process.end()
            self._processes.discard(process)
            process = self._replaced()
            return {"refused": "ended"}, None
        finally:
            self._idle.put(process)

    def _replaced(self) -> _Process:
        process = _Process(self.settings)
        self._processes.add(process)
        if self._closed:
            process.end()
        with contextlib.suppress(_Ended):  # its next image finds it ended, and has it replaced again
            process.wait()
        return process

    def _refusal(self, answer: dict[str, Any], where: str) -> Refusal:
        options = self.options
        if answer["refused"] == "format":
            names = ", ".join(options.formats)
            return bad_request(
                f"{where}: the file is not of an allowed image format. Allowed are {names}.",
                code="unsupported_image_format",
                param=where,
            )
        if answer["refused"] == "image":
            return bad_request(f"{where}: {answer['reason']}", code="invalid_image", param=where)
        if answer["refused"] == "memory":
            return bad_request(
                f"{where}: the image needs more than {options.decode_memory} bytes to be decoded; send a smaller one.",
                code="image_too_large",
                param=where,
            )
        return bad_request(
            f"{where}: the image could not be decoded within {options.decode_timeout:g} s of computing; send a smaller "
            "or simpler one.",
            code="image_too_slow",
            param=where,
        )


class _Process:
    """One process, and what it is told and says; one thread at a time asks it."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", BOOT, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # a decoder's words may hold what is in an image
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._to, self._from = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._to, False)
        self._settings: bytes | None = json.dumps(settings).encode("ascii") + b"\n"
        self._rest = b""

    def wait(self) -> None:
        """Wait until it is ready. Raises _Ended."""
        assert self._settings is not None
        until, here = time.monotonic() + START_SECONDS, threading.Event()
        self._write(self._settings, until, here)
        if not self._line(until, here).get("ready"):
            raise _Ended

    def decode(self, content: bytes, until: float, gone: threading.Event) -> tuple[dict[str, Any], Decoded | None]:
        """Return its answer, and the image unless it was refused. Raises _Ended, also at the time or without client."""
        self._write(json.dumps({"bytes": len(content)}).encode("ascii") + b"\n", until, gone)
        self._write(content, until, gone)
        answer = self._line(until, gone)
        if "refused" in answer:
            return answer, None
        shape = tuple(answer["shape"])
        encoded = self._bytes(answer["encoded"], until, gone)
        pixels = np.frombuffer(self._bytes(int(np.prod(shape)), until, gone), dtype=np.uint8).reshape(shape)
        return answer, Decoded(bytes(encoded), answer["kind"], tuple(answer["names"]), pixels, answer["own"])

    def end(self) -> None:
        """End it at once, whatever it does."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()

    def _line(self, until: float, gone: threading.Event) -> dict[str, Any]:
        while b"\n" not in self._rest:
            if len(self._rest) > MAX_LINE:
                raise _Ended
            self._rest += self._some(until, gone)
        line, _, self._rest = self._rest.partition(b"\n")
        try:
            found = json.loads(line)
        except ValueError:
            raise _Ended from None
        return found if isinstance(found, dict) else {}

    def _bytes(self, size: int, until: float, gone: threading.Event) -> bytearray:
        content = bytearray(self._rest)
        while len(content) < size:
            content += self._some(until, gone)
        self._rest = bytes(content[size:])
        del content[size:]
        return content

    def _some(self, until: float, gone: threading.Event) -> bytes:
        self._ready(until, gone, reading=True)
        try:
            piece = os.read(self._from, PIECE)
        except (OSError, ValueError):
            raise _Ended from None
        if not piece:
            raise _Ended
        return piece

    def _write(self, content: bytes, until: float, gone: threading.Event) -> None:
        left = memoryview(content)
        while left:
            self._ready(until, gone, reading=False)
            try:
                left = left[os.write(self._to, left[:PIECE]) :]
            except BlockingIOError:
                continue
            except OSError:
                raise _Ended from None

    def _ready(self, until: float, gone: threading.Event, *, reading: bool) -> None:
        """Wait for the pipe. Raises _Ended when the time is over or the client has left."""
        poll = select.poll()
        poll.register(self._from if reading else self._to, select.POLLIN if reading else select.POLLOUT)
        left_at: float | None = None
        while not poll.poll(POLL_SECONDS * 1000):
            now = time.monotonic()
            if gone.is_set() and left_at is None:
                left_at = now
            if now > until or (left_at is not None and now > left_at + GONE_SECONDS):
                raise _Ended
