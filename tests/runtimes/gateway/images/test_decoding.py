"""Decoding in processes: whatever an image does to its decoder, it alone is refused, and all others are served."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from runtimes.gateway.__main__ import main
from runtimes.gateway.app import Gateway
from runtimes.gateway.images import decoding
from runtimes.gateway.images.decoder import DecoderSettings
from runtimes.gateway.images.decoding import Decoded, Decoders
from runtimes.gateway.options import GatewayOptions
from runtimes.gateway.refusal import Refusal
from safevlm.contract.preprocessing import Preprocessing
from safevlm.errors import InputError
from safevlm.images.image import open_image
from tests.runtimes.gateway.servers import SAFE_URL, Upstream, data_url, messages, serving
from tests.safevlm.images import image_files

ROOT = Path(__file__).parents[4]
SIZE = Preprocessing(
    height=32, width=48, fit="squash", filter="bilinear", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
)  # fmt: skip
STAND_IN = """
import os, signal, sys, threading
sys.path[:] = {path!r}
import runtimes.gateway.images.decoder as decoder
inner = decoder.read_views

def read_views(content, *given, **more):
    word = content[:8].rstrip()
    if word == b"hang":
        open(os.path.join(content[8:].decode(), str(os.getpid())), "x").close()
        threading.Event().wait()
    if word == b"spin":
        while True:
            pass
    if word == b"exit":
        os._exit(0)
    if word == b"crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if word == b"memory":
        return bytearray(1 << 40)
    if word == b"raise":
        raise RuntimeError("private words")
    if word == b"lie":
        os.write(0, bytes(4096))
        threading.Event().wait()
    return inner(content, *given, **more)

decoder.read_views = read_views
decoder.serve({parent})
"""
"""A decoder that does what the image says."""


def encoded(image: Image.Image, kind: str, **more: Any) -> bytes:
    return image_files.encoded(image, kind, **more)


PLAIN = encoded(Image.new("RGB", (60, 40), "red"), "PNG")


def settings(**more: Any) -> DecoderSettings:
    given: dict[str, Any] = {"preprocessing": SIZE, "mode": "tiles", "formats": GatewayOptions().formats}
    given |= {"max_pixels": 50_000_000, "seconds": 600.0, "memory": 1 << 30, "with_image": False}
    return DecoderSettings(**given | more)


def with_decoders(work: Callable[[Decoders], Awaitable[None]], most: int = 64, **more: Any) -> None:
    async def run() -> None:
        async with Decoders(settings(**more), most) as decoders:
            await work(decoders)

    asyncio.run(run())


async def code_of(decoders: Decoders, content: bytes) -> str | None:
    """Return the code of a refusal, None for an image that was decoded."""
    try:
        await decoders.decode(content, "here")
    except Refusal as refusal:
        assert refusal.status == (503 if refusal.code in ("overloaded", "guard_unavailable") else 400)
        assert refusal.code == "overloaded" or refusal.param == "here"
        return refusal.code
    return None


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "START", STAND_IN)


def hang(folder: Path) -> bytes:
    return b"hang    " + os.fsencode(folder)


async def hanging(folder: Path, count: int = 1) -> list[int]:
    """Wait until so many decoders hang, and return their processes."""
    until = time.monotonic() + 600
    while len(found := [int(each.name) for each in folder.iterdir()]) < count:
        assert time.monotonic() < until
        await asyncio.sleep(0.01)
    return found


# -- what comes back ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_image", [False, True])
def test_the_file_that_is_sent_is_the_one_that_is_judged(with_image: bool) -> None:
    image = Image.fromarray(image_files.smooth(3, 300, 400, 3))
    layered = image.convert("RGBA")
    layered.putalpha(Image.fromarray(image_files.smooth(4, 300, 400, 1)))
    files = [encoded(image, "JPEG"), encoded(layered, "PNG"), encoded(image.resize((30, 20)), "GIF")]

    async def work(decoders: Decoders) -> None:
        for content in files:
            found: Decoded = await decoders.decode(content, "here")
            sent = open_image(base64.b64decode(found.url.partition(",")[2]))
            assert (found.pixels[0] == SIZE.apply(sent)).all()
            assert (found.image is not None) == with_image
            if found.image is not None:
                assert found.image.mode == "RGB" and (np.asarray(found.image) == np.asarray(sent)).all()
            assert len(found.pixels) == len(found.names) >= found.own >= 1
            hidden = [found.is_hidden(at) for at in range(len(found.names))]
            assert any(hidden) == (content == files[1])
            assert sent.width <= 48 * 2 * 7 / 3 and sent.height <= 32 * 2 * 7 / 3

    with_decoders(work, with_image=with_image)


# -- hostile files --------------------------------------------------------------------------------------------


def many_scans() -> bytes:
    """Return a progressive JPEG whose scans are read one after another over 40 million pixels."""
    content = encoded(Image.new("L", (8000, 5000), 77), "JPEG", progressive=True)
    first = content.index(b"\xff\xda", content.index(b"\xff\xda") + 2)  # of fine details, of which there are none
    second = content.index(b"\xff\xc4", first)
    content = content[:second] + content[first:second] * 450 + content[second:]
    assert len(content) < 500_000
    return content


def png_of(width: int, height: int, colour: int, bands: int, *more: tuple[bytes, bytes]) -> bytes:
    packer = zlib.compressobj(9)
    row = b"\0" + bytes((1, 2, 3, 4)[:bands]) * width
    rows = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), *more, (b"IDAT", rows), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def gif_canvas() -> bytes:
    frame = encoded(Image.new("P", (4, 4)), "GIF")
    return frame[:6] + struct.pack("<HH", 65_535, 65_535) + frame[10:]


def animation(kind: str) -> bytes:
    frames = [Image.new("RGB", (40, 40), (level, 0, 0)) for level in range(0, 250, 10)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:])


BOMB = zlib.compress(bytes(400_000_000), 9)
HOSTILE: dict[str, tuple[Callable[[], bytes], set[str | None]]] = {
    "scans": (many_scans, {"image_too_slow"}),
    "alpha of 50 million pixels": (lambda: png_of(10_000, 5_000, 6, 4), {"image_too_large", "image_too_slow"}),
    "more pixels than are allowed": (lambda: png_of(10_000, 5_001, 0, 1), {"invalid_image"}),
    "a canvas": (gif_canvas, {"invalid_image"}),
    "frames of WebP": (lambda: animation("WEBP"), {"invalid_image"}),
    "frames of GIF": (lambda: animation("GIF"), {"invalid_image"}),
    "frames of PNG": (lambda: animation("PNG"), {"invalid_image"}),
    "packed text": (lambda: png_of(9, 9, 2, 3, (b"iTXt", b"k\0\1\0\0\0" + BOMB)), {"invalid_image", None}),
    "packed profile": (lambda: png_of(9, 9, 2, 3, (b"iCCP", b"k\0\0" + BOMB)), {"invalid_image", None}),
    "nothing": (lambda: b"", {"invalid_image"}),
    "noise": (lambda: bytes(range(256)) * 9, {"invalid_image"}),
    "a cut JPEG": (lambda: encoded(Image.new("RGB", (90, 90), "red"), "JPEG")[:-40], {"invalid_image"}),
}


def test_hostile_files_are_refused_and_the_next_image_is_served() -> None:
    async def work(decoders: Decoders) -> None:
        for name, (make, allowed) in HOSTILE.items():
            assert await code_of(decoders, make()) in allowed | {"image_too_slow"}, name
            assert await served(decoders), name

    with_decoders(work, seconds=0.5)


def test_other_formats_are_refused_by_their_content() -> None:
    image = Image.new("RGB", (32, 32), "red")

    async def refused(decoders: Decoders) -> None:
        for name in ("JPEG2000", "TIFF", "AVIF", "PPM", "ICO", "PCX", "SGI", "DDS"):
            assert await code_of(decoders, encoded(image, name)) == "unsupported_image_format", name

    async def taken(decoders: Decoders) -> None:
        for name in ("JPEG2000", "TIFF", "AVIF", "PPM", "PNG"):
            assert await code_of(decoders, encoded(image, name)) is None, name
        assert await code_of(decoders, encoded(image, "JPEG")) == "unsupported_image_format"

    with_decoders(refused)
    with_decoders(taken, formats=("JPEG2000", "TIFF", "AVIF", "PPM", "PNG"))


def test_formats_are_a_list_out_of_those_that_there_are() -> None:
    for given in ((), ("PNG", "EPS"), ("png",), ("",)):
        with pytest.raises(InputError, match="--formats"):
            GatewayOptions(formats=given)
    found = CliRunner().invoke(main, ["--bundle", "none", "--formats", "jpeg,eps"])
    assert isinstance(found.exception, InputError) and "JPEG,EPS" in str(found.exception)


# -- decoders that fail ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("stand_in")
def test_a_decoder_that_fails_in_any_way_is_replaced() -> None:
    async def work(decoders: Decoders) -> None:
        for word, wanted in (
            (b"exit", "invalid_image"),
            (b"crash", "invalid_image"),
            (b"memory", "image_too_large"),
            (b"raise", "invalid_image"),
            (b"lie", "invalid_image"),
        ):
            for _ in range(2):
                assert await code_of(decoders, word) == wanted, word
            assert await asyncio.gather(*(code_of(decoders, PLAIN) for _ in range(9))) == [None] * 9, word

    with_decoders(work)


@pytest.mark.usefixtures("stand_in")
def test_a_decoder_that_computes_for_ever_is_replaced() -> None:
    async def work(decoders: Decoders) -> None:
        for _ in range(2):
            assert await code_of(decoders, b"spin") == "image_too_slow"
        assert await served(decoders)

    with_decoders(work, seconds=0.5)


async def served(decoders: Decoders) -> bool:
    """Return whether a plain image is decoded: on a busy machine not at once, where little time is allowed."""
    for _ in range(100):
        code = await code_of(decoders, PLAIN)
        if code != "image_too_slow":
            return code is None
    return False


@pytest.mark.usefixtures("stand_in")
def test_what_waits_for_ever_is_ended_by_the_clock(tmp_path: Path) -> None:
    async def work(decoders: Decoders) -> None:
        assert await code_of(decoders, hang(tmp_path)) == "image_too_slow"

    with_decoders(work, seconds=0.3)


@pytest.mark.usefixtures("stand_in")
def test_images_that_hang_leave_room_for_others(tmp_path: Path) -> None:
    """More of them than there are processes: one goes on, the others are given up once somebody waits."""

    async def work(decoders: Decoders) -> None:
        count = 2 * len(decoders._processes)
        slow = [asyncio.ensure_future(code_of(decoders, hang(tmp_path))) for _ in range(count)]
        others = [code_of(decoders, PLAIN) for _ in range(20)]
        assert await asyncio.gather(*others) == [None] * 20
        left = [each for each in slow if not each.done()]
        assert left, "some hang while all others are served"
        assert {each.result() for each in slow if each.done()} == {"overloaded"}
        for process in await hanging(tmp_path):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        for each in left:
            each.cancel()

    with_decoders(work)


@pytest.mark.usefixtures("stand_in")
def test_nobody_waits_without_end(tmp_path: Path) -> None:
    async def work(decoders: Decoders) -> None:
        busy = [asyncio.ensure_future(code_of(decoders, hang(tmp_path))) for _ in range(len(decoders._processes) + 3)]
        await asyncio.sleep(0)
        assert await code_of(decoders, PLAIN) == "overloaded"
        for each in busy:
            each.cancel()
        assert {type(each) for each in await asyncio.gather(*busy, return_exceptions=True)} <= {
            asyncio.CancelledError,
            str,
        }

    with_decoders(work, most=1)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("late", [False, True])
def test_nobody_works_for_a_client_that_has_left(late: bool, tmp_path: Path) -> None:
    async def work(decoders: Decoders) -> None:
        left = asyncio.ensure_future(decoders.decode(hang(tmp_path), "here"))
        (process,) = await hanging(tmp_path)
        while late and not decoders._slow:
            await asyncio.sleep(0.01)
        left.cancel()
        await ended(process)
        assert await asyncio.gather(*(code_of(decoders, PLAIN) for _ in range(9))) == [None] * 9

    with_decoders(work)


async def ended(process: int) -> None:
    until = time.monotonic() + 600
    while is_alive(process):
        assert time.monotonic() < until
        await asyncio.sleep(0.01)


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="ascii", errors="replace").split(") ")[1][0] != "Z"
    except OSError:
        return False


def test_a_decoder_that_ended_while_it_had_nothing_to_do_is_no_clients_fault() -> None:
    async def work(decoders: Decoders) -> None:
        for process in [each._process for each in decoders._processes if each._process]:
            process.kill()
            await ended(process.pid)
        assert await asyncio.gather(*(code_of(decoders, PLAIN) for _ in range(9))) == [None] * 9

    with_decoders(work)


# -- the processes --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("stand_in")
def test_a_decoder_holds_nothing_of_its_gateway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPSTREAM_KEY", "a-secret-of-ours")

    async def work(decoders: Decoders) -> None:
        waits = asyncio.ensure_future(decoders.decode(hang(tmp_path), "here"))
        (process,) = await hanging(tmp_path)
        files = {Path(each).readlink() for each in Path(f"/proc/{process}/fd").iterdir()}
        assert sum(str(each).startswith("socket:") for each in files) == 1 and len(files) <= 3
        assert b"a-secret" not in Path(f"/proc/{process}/environ").read_bytes()
        os.kill(process, signal.SIGINT)  # as Ctrl-C
        assert await code_of(decoders, PLAIN) is None
        assert is_alive(process) and not waits.done()
        waits.cancel()

    with Path(os.devnull).open(), socket.create_server(("127.0.0.1", 0)):
        with_decoders(work)


def test_decoders_end_with_a_gateway_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import asyncio, os, sys\n"
        "from pathlib import Path\n"
        "from runtimes.gateway.images import decoding\n"
        "from tests.runtimes.gateway.images.test_decoding import STAND_IN, hang, settings\n"
        "decoding.START = STAND_IN\n"
        "async def run():\n"
        "    async with decoding.Decoders(settings(), 9) as decoders:\n"
        "        print(*(each._process.pid for each in decoders._processes if each._process), flush=True)\n"
        "        await decoders.decode(hang(Path(sys.argv[1])), 'here')\n"
        "asyncio.run(run())\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE) as gateway:
        assert gateway.stdout is not None
        processes = [int(each) for each in gateway.stdout.readline().split()]
        assert len(processes) >= 2

        async def work() -> None:
            await hanging(tmp_path)
            gateway.kill()
            for each in processes:
                await ended(each)

        asyncio.run(work())


def test_a_decoder_that_does_not_start_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    from safevlm.errors import SafeVLMError

    monkeypatch.setattr(decoding, "START", "raise SystemExit(7)")
    with pytest.raises(SafeVLMError, match="did not start: it ended with code 7"):
        with_decoders(lambda _: asyncio.sleep(0))


# -- the whole gateway ----------------------------------------------------------------------------------------


@pytest.fixture
def clients() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


@pytest.mark.usefixtures("stand_in")
def test_a_gateway_answers_while_an_image_hangs(
    bundle: Path, upstream: Upstream, tmp_path: Path, clients: ThreadPoolExecutor
) -> None:
    options = GatewayOptions(decode_timeout=600, max_images=20)
    with serving(Gateway.open(bundle, upstream=upstream.url, options=options)) as url:

        def ask(*urls: str) -> httpx.Response:
            return httpx.post(f"{url}/v1/chat/completions", json={"model": "m", "messages": messages(*urls)})

        hung = clients.submit(ask, data_url(hang(tmp_path)))
        (process,) = asyncio.run(hanging(tmp_path))
        for path in ("/livez", "/readyz", "/healthz"):
            assert httpx.get(url + path).status_code == 200
        assert [each.status_code for each in clients.map(ask, [SAFE_URL] * 12)] == [200] * 12
        assert ask(SAFE_URL, SAFE_URL, SAFE_URL).status_code == 200
        assert not hung.done()
        os.kill(process, signal.SIGKILL)
        refused = hung.result(600)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "image_too_large")
        assert "messages[0].content[0]" in refused.json()["error"]["param"]
        assert len(upstream.requests) == 13


def test_a_gateway_refuses_slow_and_other_images_by_name(bundle: Path, upstream: Upstream) -> None:
    for content, wanted, seconds in (
        (many_scans(), "image_too_slow", 0.5),
        (encoded(Image.new("L", (9, 9)), "TIFF"), "unsupported_image_format", 600),
    ):
        options = GatewayOptions(decode_timeout=seconds)
        with serving(Gateway.open(bundle, upstream=upstream.url, options=options)) as url:
            for path, body in (
                ("chat/completions", {"messages": messages(data_url(content, "image/jpeg"))}),
                ("guard", {"images": [data_url(content)]}),
            ):
                found = httpx.post(f"{url}/v1/{path}", json=body)
                assert (found.status_code, found.json()["error"]["code"]) == (400, wanted)
    assert not upstream.requests


def test_a_jpeg_goes_upstream_as_one_of_its_size(address: str, upstream: Upstream) -> None:
    image = Image.open(io.BytesIO(base64.b64decode(SAFE_URL.partition(",")[2]))).convert("RGB")
    content = encoded(image, "JPEG", quality=80, comment=b"words of the client's")
    body = {"model": "m", "messages": messages(data_url(content, "image/jpeg"))}
    assert httpx.post(f"{address}/v1/chat/completions", json=body).status_code == 200
    kind, _, packed = upstream.requests[0]["messages"][0]["content"][0]["image_url"]["url"].partition(",")
    sent = base64.b64decode(packed)
    assert kind == "data:image/jpeg;base64" and b"words" not in sent and len(sent) <= 1.5 * len(content)
