"""The processes that decode: what hangs, crashes or grows in one of them costs its own request and no other."""

from __future__ import annotations

import asyncio
import io
import os
import struct
import zlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from models.preprocessing import Preprocessing
from runtimes.gateway import decoding
from runtimes.gateway.decoding import Decoded, Decoding
from runtimes.gateway.options import GatewayOptions
from runtimes.gateway.refusal import Refusal
from runtimes.judge import Guard
from tests.runtimes.gateway.servers import SAFE, png

FAULTS = """
import os, signal, time
import runtimes.gateway.decoder as decoder
honest, read = decoder._answer, decoder._read
def fault(content, *given, **more):
    if content == b"hangs":
        time.sleep(100_000)
    if content == b"computes":
        while True:
            pass
    decoder._read = read
    if content == b"exits":
        os._exit(0)
    if content == b"crashes":
        os.kill(os.getpid(), signal.SIGSEGV)
    if content == b"grows":
        decoder._read = lambda *given: bytearray(1 << 40)
    return honest(content, *given, **more)
decoder._answer = fault
"""


@pytest.fixture(scope="module")
def size(bundle: Path) -> Preprocessing:
    with Guard.open(bundle) as guard:
        return guard.runner.preprocessing


def decoded(
    size: Preprocessing, work: Callable[[Decoding], Awaitable[Any]], *, mode: str = "tiles", **options: Any
) -> Any:
    """Do work with a pool of one process, unless ``decoders`` says otherwise."""

    async def run() -> Any:
        async with Decoding(size, mode, GatewayOptions(**{"decoders": 1, "guard_timeout": 600, **options})) as pool:
            return await work(pool)

    return asyncio.run(run())


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that misbehave when they are given a word for an image."""
    monkeypatch.setattr(decoding, "BOOT", decoding.BOOT.replace("from runtimes", f"exec({FAULTS!r}); from runtimes"))


@pytest.mark.parametrize(
    ("word", "code"),
    [
        ("computes", "image_too_slow"),
        ("exits", "image_too_slow"),
        ("crashes", "image_too_slow"),
        ("grows", "image_too_large"),
    ],
)
@pytest.mark.usefixtures("faulty")
def test_a_decoder_that_fails_costs_its_own_request(size: Preprocessing, word: str, code: str) -> None:
    async def work(pool: Decoding) -> Decoded:
        with pytest.raises(Refusal) as refused:
            await pool.decode(word.encode(), "here")
        assert (refused.value.status, refused.value.code, refused.value.param) == (400, code, "here")
        return await pool.decode(png(SAFE), "here")

    assert decoded(size, work, decode_timeout=0.5).own == 1


@pytest.mark.usefixtures("faulty")
def test_others_are_served_while_one_hangs(size: Preprocessing) -> None:
    async def work(pool: Decoding) -> None:
        hangs = asyncio.create_task(pool.decode(b"hangs", "here"))
        for _ in range(5):
            await pool.decode(png(SAFE), "there")
        assert not hangs.done()
        hangs.cancel()
        for _ in range(2):  # its process is free again for these two at once
            await asyncio.gather(pool.decode(png(SAFE), "there"), pool.decode(png(SAFE), "there"))

    decoded(size, work, decoders=2)


@pytest.mark.usefixtures("faulty")
def test_one_that_hangs_is_ended_at_its_time(size: Preprocessing) -> None:
    async def work(pool: Decoding) -> None:
        with pytest.raises(Refusal, match="could not be decoded") as refused:
            await pool.decode(b"hangs", "here")
        assert refused.value.code == "image_too_slow"

    decoded(size, work, guard_timeout=0.5)


@pytest.mark.usefixtures("faulty")
def test_too_many_that_wait_are_told_to_come_again(size: Preprocessing) -> None:
    async def work(pool: Decoding) -> None:
        waiting = [asyncio.create_task(pool.decode(b"hangs", "here")) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(Refusal) as refused:
            await pool.decode(png(SAFE), "here")
        assert (refused.value.status, refused.value.code) == (503, "overloaded")
        for each in waiting:
            each.cancel()

    decoded(size, work, queue=2)


def test_no_process_outlives_its_pool(size: Preprocessing) -> None:
    async def work(pool: Decoding) -> list[int]:
        return [each._process.pid for each in pool._processes]

    for pid in decoded(size, work, decoders=2):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


# -- files --------------------------------------------------------------------------------------------------


def saved(image: Image.Image, kind: str, **more: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **more)
    return buffer.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def bomb(name: bytes, head: bytes) -> bytes:
    """Return a PNG with a compressed chunk that unpacks to 400 MB."""
    packed = zlib.compressobj(9)
    data = b"".join(packed.compress(bytes(1 << 20)) for _ in range(400)) + packed.flush()
    plain = png(SAFE)
    return plain[:33] + chunk(name, head + data) + plain[33:]


def many_scans() -> bytes:
    """Return a progressive JPEG whose last scan stands there 700 times."""
    content = saved(Image.new("L", (2000, 2000), 90), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * 700 + content[-2:]


HOSTILE = {
    "many scans": many_scans,
    "a wide PNG of nothing": lambda: saved(Image.new("L", (7000, 7000)), "PNG"),
    "50 Mpx of alpha": lambda: saved(Image.new("LA", (7000, 7000), (9, 90)), "PNG"),
    "a large GIF": lambda: b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\0\0\0,\0\0\0\0\1\0\1\0\0\2\2D\1\0;",
    "an animation": lambda: saved(SAFE, "WEBP", save_all=True, append_images=[SAFE.rotate(90)]),
    "a bomb in iTXt": lambda: bomb(b"iTXt", b"key\0\1\0\0\0"),
    "a bomb in zTXt": lambda: bomb(b"zTXt", b"key\0\0"),
    "a bomb in iCCP": lambda: bomb(b"iCCP", b"key\0\0"),
    "half a file": lambda: png(SAFE)[:200],
    "nothing": lambda: b"",
    "words": lambda: b"not an image",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_answered_and_the_next_one_read(size: Preprocessing, name: str) -> None:
    async def work(pool: Decoding) -> Decoded | Refusal:
        found: Decoded | Refusal
        try:
            found = await pool.decode(HOSTILE[name](), "here")
        except Refusal as refusal:
            found = refusal
        await pool.decode(png(SAFE), "here")
        return found

    found = decoded(size, work)
    if isinstance(found, Refusal):
        assert found.status == 400 and found.code in ("invalid_image", "image_too_large", "image_too_slow")


@pytest.mark.parametrize("kind", ["TIFF", "JPEG2000", "AVIF", "PPM"])
def test_formats_are_a_list_and_told_by_content(size: Preprocessing, kind: str) -> None:
    content = saved(SAFE, kind)

    async def refused(pool: Decoding) -> None:
        with pytest.raises(Refusal) as found:
            await pool.decode(content, "here")
        assert (found.value.status, found.value.code) == (400, "unsupported_image_format")

    decoded(size, refused)
    assert decoded(size, lambda pool: pool.decode(content, "here"), formats=(kind,)).own == 1


@pytest.mark.parametrize("mode", ["tiles", "judged", "whole"])
def test_what_goes_on_is_what_is_judged(size: Preprocessing, mode: str) -> None:
    large = SAFE.resize((5 * SAFE.width, 4 * SAFE.height))
    found = decoded(size, lambda pool: pool.decode(png(large), "here"), mode=mode)
    sent = Image.open(io.BytesIO(found.content)).convert("RGB")
    np.testing.assert_array_equal(found.pixels[0], size.apply(sent) if mode != "judged" else np.asarray(sent))
    assert (found.own > 1) == (mode == "tiles") and len(found.names) == len(found.pixels) == found.own
