"""A process that decodes images for a gateway, and may be killed at any time: it holds nothing but the image at hand.

It is started by ``runtimes.gateway.images.decoding`` and speaks over a socket, its standard input: first come the
settings, then images, each answered before the next; JSON and bytes, nothing that is executed when it is read. It ends
with its parent, and when the socket does.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from runtimes.gateway.images.encoding import Encoded, encode
from runtimes.images.tiling import ViewMode
from runtimes.images.views import read_views
from safevlm.contract.preprocessing import Preprocessing
from safevlm.errors import ImageFileError, ImageFormatError
from safevlm.machine import return_freed_memory

__all__ = ["DecoderSettings", "serve"]

PR_SET_PDEATHSIG = 1
"""prctl(2): the signal that comes when the thread ends which started this process."""


@dataclass(frozen=True, kw_only=True)
class DecoderSettings:
    """What is done with each image, and what it may take: seconds of processor time and bytes of memory."""

    preprocessing: Preprocessing
    mode: ViewMode
    formats: tuple[str, ...]
    max_pixels: int
    seconds: float
    memory: int
    with_image: bool
    """Whether the image is wanted in full, too."""

    def packed(self) -> bytes:
        """Return it as JSON."""
        return json.dumps({**vars(self), "preprocessing": self.preprocessing.model_dump(mode="json")}).encode()

    @classmethod
    def unpacked(cls, content: bytes) -> DecoderSettings:
        """Read what :meth:`packed` wrote."""
        given = json.loads(content)
        preprocessing = Preprocessing.model_validate(given.pop("preprocessing"))
        return cls(preprocessing=preprocessing, formats=tuple(given.pop("formats")), **given)


def serve(parent: int) -> None:
    """Answer images until the socket ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before that
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    warnings.simplefilter("ignore")
    return_freed_memory()
    with Connection(0) as socket:
        settings = DecoderSettings.unpacked(socket.recv_bytes())
        Image.init()
        _bound(settings.memory)
        socket.send_bytes(b"ready")
        while True:
            try:
                content = socket.recv_bytes()
            except EOFError:
                return
            signal.setitimer(signal.ITIMER_PROF, settings.seconds)
            try:
                parts = _decoded(content, settings)
            except Exception as error:  # of any kind: a library's decoder met what it was not made for
                parts = [json.dumps(_failure(error)).encode()]
            signal.setitimer(signal.ITIMER_PROF, 0)
            for part in parts:
                socket.send_bytes(part)


def _bound(memory: int) -> None:
    """Allow so many bytes beside what is taken already, no files and no remains of a crash."""
    limits = {resource.RLIMIT_FSIZE: 0, resource.RLIMIT_CORE: 0}
    if sys.platform == "linux":
        taken = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        limits[resource.RLIMIT_AS] = taken + memory
    for limit, most in limits.items():
        resource.setrlimit(limit, (most, most))


def _decoded(content: bytes, settings: DecoderSettings) -> list[bytes | memoryview]:
    """Return an image's description, its file for others, the guard's pixels and, where wanted, the image itself."""
    file: Encoded | None = None

    def sent(image: Image.Image) -> Image.Image:
        nonlocal file
        file = encode(image, content)
        return file.image

    views = read_views(
        content,
        settings.preprocessing,
        "the given bytes",
        max_pixels=settings.max_pixels,
        mode=settings.mode,
        formats=settings.formats,
        sent=sent,
    )
    assert file is not None  # the usual view is always sent
    told = {"names": views.names, "own": views.own, "kind": file.kind, "size": views.image.size}
    parts: list[bytes | memoryview] = [json.dumps(told).encode(), file.content, np.stack(views.pixels).data.cast("B")]
    return [*parts, views.image.tobytes()] if settings.with_image else parts


def _failure(error: Exception) -> dict[str, Any]:
    """Return why an image cannot be decoded, without the text of a library's error."""
    if isinstance(error, MemoryError) or isinstance(error.__cause__, MemoryError):
        return {"code": "image_too_large"}
    if isinstance(error, ImageFormatError):
        return {"code": "unsupported_image_format", "reason": str(error)}
    if isinstance(error, ImageFileError):
        return {"code": "invalid_image", "reason": str(error)}
    return {"code": "invalid_image", "fault": type(error).__name__}
