"""A process that decodes images for a gateway, one after the other: ``runtimes.gateway.decoding`` starts and ends it.

It has a limit of memory, and for each image a limit of processor time, at which the system ends it, in whatever
decoder it is; it ends by itself when its gateway does. It answers in JSON and plain bytes, so that a decoder that was
taken over cannot say more. A first line of JSON on its standard input has the settings; then comes, for each image, a
line of JSON and the file.
"""

from __future__ import annotations

import io
import json
import os
import resource
import signal
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from models.errors import ImageFileError
from models.image import DECODER_ERRORS
from models.preprocessing import Preprocessing
from runtimes.gateway.encoding import Encoded, encode, stated_quality
from runtimes.gateway.packed_images import is_image
from runtimes.views import ImageViews, read_views

__all__ = ["main"]

JPEG_FORMATS = ("JPEG", "MPO")
EXACT_FORMATS = ("PNG", "GIF", "BMP", "TIFF", "PPM")
LOSSLESS_WEBP = b"VP8L"
BEST_QUALITY = 95
Answer = tuple[dict[str, Any], list[bytes]]


def main() -> None:
    """Serve standard input until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a library prints is no answer
    settings = json.loads(source.readline())
    preprocessing = Preprocessing(**settings.pop("preprocessing"))
    _bound_memory(settings.pop("memory"))
    seconds = settings.pop("seconds")
    Image.init()
    _send(sink, {"ready": True}, [])
    while line := source.readline():
        request = json.loads(line)
        content = source.read(request["bytes"])
        signal.setitimer(signal.ITIMER_PROF, seconds)  # of the processor: a busy machine takes nothing from an image
        answer, parts = _answer(content, preprocessing, **settings)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _send(sink, answer, parts)
        del content, answer, parts


def _answer(content: bytes, preprocessing: Preprocessing, *, formats: list[str], mode: Any, max_pixels: int) -> Answer:
    try:
        stored = _stored(content, formats)
        if stored is None:
            return {"refused": "format"}, []
        return _read(content, stored, preprocessing, mode, max_pixels)
    except ImageFileError as error:
        if isinstance(error.__cause__, MemoryError):
            return {"refused": "memory"}, []
        return {"refused": "image", "reason": str(error).removeprefix("the given bytes: ")}, []
    except MemoryError:
        return {"refused": "memory"}, []


def _stored(content: bytes, formats: list[str]) -> tuple[str, int | None] | None:
    """Return the format of a file and the JPEG quality that it has, None for a format that is not allowed."""
    allowed = [name for name in (*formats, *(JPEG_FORMATS if "JPEG" in formats else ())) if name in Image.OPEN]
    try:
        with Image.open(io.BytesIO(content), formats=allowed) as image:
            kind = image.format or ""
            if kind in JPEG_FORMATS:
                return kind, stated_quality(getattr(image, "quantization", None))
    except UnidentifiedImageError:
        begins_so = any(accept is None or accept(content[:16]) for _, accept in map(Image.OPEN.__getitem__, allowed))
        return None if is_image(content) and not begins_so else ("", None)
    except DECODER_ERRORS:
        return "", None  # reading it says what is wrong with it
    is_exact = kind in EXACT_FORMATS or (kind == "WEBP" and content[12:16] == LOSSLESS_WEBP)
    return kind, None if is_exact else BEST_QUALITY


def _read(
    content: bytes, stored: tuple[str, int | None], preprocessing: Preprocessing, mode: Any, max_pixels: int
) -> Answer:
    """Read every view of a file; judge its usual one as it is written anew, for that is what is shown."""
    views = read_views(content, preprocessing, "the given bytes", max_pixels=max_pixels, mode=mode)
    encoded = encode(views.image, len(content), lossy=stored[1])
    shown = read_views(encoded.content, preprocessing, "the given bytes", max_pixels=max_pixels, mode=mode)
    return _found(views, shown, encoded)


def _found(views: ImageViews, shown: ImageViews, encoded: Encoded) -> Answer:
    if shown.own != len(shown.pixels):
        raise AssertionError("what is sent on has one view")
    own = views.names[: views.own] if shown.own == views.own else shown.names
    names = (*own, *views.names[views.own :])
    pixels = np.stack([*shown.pixels, *views.pixels[views.own :]])
    stated = {"names": names, "own": shown.own, "shape": pixels.shape, "kind": encoded.kind}
    return {**stated, "encoded": len(encoded.content)}, [encoded.content, pixels.tobytes()]


def _send(sink: BinaryIO, answer: dict[str, Any], parts: list[bytes]) -> None:
    sink.write(json.dumps(answer).encode("ascii") + b"\n")
    for part in parts:
        sink.write(part)
    sink.flush()


def _bound_memory(size: int) -> None:
    """Allow ``size`` bytes more than what the process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + size
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    main()
