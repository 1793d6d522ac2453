"""What bad requests get, each with an error in OpenAI's shape; nothing of them goes upstream."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from runtimes.gateway.app import Gateway
from runtimes.gateway.options import GatewayOptions
from runtimes.guard.runner import GuardOutput
from safevlm.errors import InputError
from tests.runtimes.gateway.servers import SAFE, SAFE_URL, UNSAFE_URL, Upstream, data_url, messages, png, serving
from tests.runtimes.guard.hanging_runners import busy


def ask(address: str, body: Any, **more: Any) -> httpx.Response:
    return httpx.post(f"{address}/v1/chat/completions", json=body, timeout=600, **more)


def refused(response: httpx.Response, status: int, word: str, kind: str = "invalid_request_error") -> None:
    error = response.json()["error"]
    assert (response.status_code, error["type"]) == (status, kind), error
    assert set(error) == {"message", "type", "param", "code"}
    assert word in error["message"]


def lying_png(width: int, height: int) -> bytes:
    """A small file whose header states another size, checksum and all."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"\0" * 100)
    chunks = (header, data, b"IEND")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )


def bomb() -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (30_000, 30_000)).save(buffer, "PNG")  # 0.9 gigapixels in a megabyte
    return buffer.getvalue()


def animated() -> bytes:
    buffer = io.BytesIO()
    frames = [SAFE, SAFE.rotate(90)]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("url", "word"),
    [
        (data_url(lying_png(400, 400)), "cannot be decoded"),
        (data_url(lying_png(60_000, 60_000)), "too large to be decoded"),
        (data_url(b"no image at all"), "not an image of a known format"),
        (data_url(png(SAFE)[:200]), "cannot be decoded"),
        (data_url(animated(), "image/gif"), "animated or has several pages"),
        (data_url(b""), "it is empty"),
        (data_url(png(SAFE), "text/html"), "says it is text/html"),
        ("data:image/png;base64,!!!!", "not valid base64"),
        ("data:image/png,plain", "must begin with data:image"),
        ("", "an image must be given as a URL"),
        ({"url": 3}, "an image must be given as a URL"),
        ("file:///etc/passwd", "not fetched from there"),
        ("ftp://images.example/a.png", "not fetched from there"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_images_that_are_none(address: str, upstream: Upstream, url: Any, word: str) -> None:
    asked = [{"role": "user", "content": [{"type": "image_url", "image_url": url}, {"type": "text", "text": "?"}]}]
    refused(ask(address, {"messages": asked}), 400, word)
    assert not upstream.requests


def test_a_decompression_bomb_is_refused_before_it_is_decoded(address: str, upstream: Upstream) -> None:
    asked = {"messages": messages(data_url(bomb()))}
    refused(ask(address, asked), 400, "too large to be decoded")
    assert not upstream.requests


def test_fifty_images_are_too_many(address: str, upstream: Upstream) -> None:
    refused(ask(address, {"messages": messages(*[SAFE_URL] * 50)}), 400, "more than 8 images")
    refused(httpx.post(f"{address}/v1/guard", json={"images": [SAFE_URL] * 50}), 400, "more than 8 images")
    assert not upstream.requests


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ([], "JSON object"),
        ({}, "'messages' must be a list"),
        ({"messages": []}, "'messages' must be a list"),
        ({"messages": ["hi"]}, "must be an object with a role"),
        ({"messages": [{"role": "user", "content": 3}]}, "must be text or a list"),
        ({"messages": [{"role": "user", "content": "hi", "images": [SAFE_URL]}]}, "the key 'images'"),
        ({"messages": [{"role": "user", "content": [{"type": "input_image", "image_url": SAFE_URL}]}]}, "input_image"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": SAFE_URL}]}]}, "'image'"),
        ({"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "x"}}]}]}, "video_url"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "image_url": SAFE_URL}]}]}, "'text'"),
        ({"messages": [{"role": "user", "content": [3]}]}, "is of type 'None'"),
        ({"messages": [{"role": "user", "content": [SAFE_URL]}]}, "holds a data URL of an image"),
        ({"messages": [{"role": "user", "content": "hi"}], "multi_modal_data": {"image": "x"}}, "multi_modal_data"),
        ({"messages": [{"role": "user", "content": "hi"}], "image_urls": ["x"]}, "image_urls"),
        ({"messages": [{"role": "user", "content": "hi"}], "stream": 1}, "true or false"),
        ({"messages": [{"role": "user", "content": "hi"}], "modalities": ["text", "audio"]}, "can only be text"),
    ],
    ids=lambda value: str(value)[-40:],
)
def test_ways_past_the_guard_are_closed(address: str, upstream: Upstream, body: Any, word: str) -> None:
    refused(ask(address, body), 400, word)
    assert not upstream.requests


def test_a_body_that_is_no_json(address: str) -> None:
    for content in (b"{", b"\xff\xfe", b"[" * 100, b'{"temperature": NaN}'):
        refused(httpx.post(f"{address}/v1/chat/completions", content=content), 400, "not JSON")


def raw(address: str, head: bytes, pieces: Iterator[bytes] | None = None) -> bytes:
    """Send bytes as they are and return what comes back until the connection closes or the answer is there."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=600) as sent:
        sent.sendall(head)
        try:
            for piece in pieces or iter(()):
                sent.sendall(piece)
        except OSError:
            pass  # the server has answered and closed
        sent.settimeout(600)
        found = b""
        while b"\r\n\r\n" not in found or not found.rstrip().endswith(b"}"):
            try:
                piece = sent.recv(65536)
            except ConnectionError:
                break
            if not piece:
                break
            found += piece
    return found


def test_a_gigabyte_is_refused_by_its_header_and_by_its_length(address: str, upstream: Upstream) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\nconnection: close\r\n"
    found = raw(address, head + b"content-length: 1000000000\r\n\r\n")
    assert b"413" in found.split(b"\r\n")[0] and b"more than 33554432 bytes" in found
    sent = 0

    def pieces() -> Iterator[bytes]:
        nonlocal sent
        while sent < 200 * 2**20:
            sent += 2**20
            yield b"100000\r\n" + b" " * 2**20 + b"\r\n"

    found = raw(address, head + b"transfer-encoding: chunked\r\n\r\n", pieces())
    assert sent < 150 * 2**20, "it was cut off long before its end"
    assert not found or b"413" in found.split(b"\r\n")[0]
    assert not upstream.requests
    assert httpx.get(f"{address}/healthz").status_code == 200


def test_a_body_that_does_not_come(bundle: Path, upstream: Upstream) -> None:
    options = GatewayOptions(body_timeout=0.3)
    with serving(Gateway.open(bundle, upstream=upstream.url, options=options)) as url:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: 50\r\n\r\n{"
        assert b"408" in raw(url, head).split(b"\r\n")[0]


def test_more_requests_than_may_be_served(bundle: Path, upstream: Upstream) -> None:
    release = threading.Event()

    def wait(handler: Any, body: Any) -> None:
        release.wait(600)
        handler.reply({"choices": []})

    upstream.behave = wait
    with serving(Gateway.open(bundle, upstream=upstream.url, options=GatewayOptions(max_concurrent=1))) as url:
        first = threading.Thread(target=ask, args=(url, {"messages": [{"role": "user", "content": "a"}]}))
        first.start()
        until = time.monotonic() + 600
        while not upstream.requests and time.monotonic() < until:
            time.sleep(0.01)
        second = ask(url, {"messages": [{"role": "user", "content": "b"}]})
        assert httpx.get(f"{url}/healthz").status_code == 200, "health is told all the same"
        release.set()
        first.join()
    refused(second, 503, "1 requests are being served", "overloaded_error")
    assert second.headers["retry-after"] == "1"


# -- the guard ------------------------------------------------------------------------------------------


def throw(_: Any) -> GuardOutput:
    raise ValueError("secret detail")


def garbage(rgb: Any) -> GuardOutput:
    import numpy as np

    rows = np.full((len(rgb), 20), 0.3, np.float32)
    return GuardOutput(probs=rows, logits=rows)


RELEASED = threading.Event()


def hang(rgb: Any) -> GuardOutput:
    RELEASED.wait(600)
    return garbage(rgb)


@pytest.mark.parametrize("fault", [throw, garbage, hang], ids=["throws", "garbage", "hangs"])
def test_a_guard_that_fails_lets_nothing_pass(bundle: Path, upstream: Upstream, fault: Any) -> None:
    options = GatewayOptions(guard_timeout=1.0 if fault is hang else 600.0)
    gateway = Gateway.open(bundle, upstream=upstream.url, options=options)
    assert gateway.gate.guard is not None
    runner: Any = gateway.gate.guard.runner
    with serving(gateway) as url:
        good = runner._run
        runner._run = fault
        response = ask(url, {"messages": messages(SAFE_URL)})
        refused(response, 503, "the request was not answered", "guard_error")
        assert "secret" not in response.text and not upstream.requests
        if fault is hang:
            assert httpx.get(f"{url}/healthz").json()["guard"] == "stuck"
            object.__setattr__(options, "guard_timeout", 600.0)
            RELEASED.set()
            while httpx.get(f"{url}/healthz").json()["guard"] == "stuck":
                time.sleep(0.01)
        runner._run = good
        assert ask(url, {"messages": messages(SAFE_URL)}).status_code == 200, "it goes on once the guard does"


def test_a_guard_that_hangs_keeps_the_next_image_from_being_judged(bundle: Path, upstream: Upstream) -> None:
    """The first answer is late, the second refused at once, the third right: none is another image's."""
    gateway = Gateway.open(bundle, upstream=upstream.url, options=GatewayOptions(guard_timeout=1.0))
    assert gateway.gate.guard is not None
    runner: Any = gateway.gate.guard.runner
    runner.exclusive = True  # as TensorRT's
    good, released, ended = runner._run, threading.Event(), threading.Event()

    def hang(rgb: Any) -> GuardOutput:
        released.wait(600)
        try:
            return good(rgb)
        finally:
            ended.set()

    with serving(gateway) as url:
        runner._run = hang
        refused(ask(url, {"messages": messages(SAFE_URL)}), 503, "no", "guard_error")
        runner._run = good
        second = ask(url, {"messages": messages(UNSAFE_URL)})
        refused(second, 503, "the guard is busy with an earlier image, so the request was not answered.", "guard_error")
        assert second.headers["Retry-After"] == "1" and not upstream.requests
        released.set()
        assert ended.wait(600)
        while (last := ask(url, {"messages": messages(UNSAFE_URL)})).status_code == 503:
            time.sleep(0.01)
        assert last.json()["safe_vlm"]["verdict"] == "block"
        assert not upstream.requests


@pytest.mark.parametrize("stream", [False, True])
def test_a_language_model_that_is_busy_refuses_in_plain_words(bundle: Path, stream: bool) -> None:
    gateway = Gateway.open(bundle, model="tiny-safegem")
    assert gateway.gate.language is not None
    with serving(gateway) as url, busy(gateway.gate.language):
        response = ask(url, {"messages": messages(SAFE_URL), "stream": stream})
        refused(
            response,
            503,
            "the language model is busy with an earlier image; the request was not answered",
            "overloaded_error",
        )


def test_a_full_queue_says_when_to_come_again(bundle: Path, upstream: Upstream) -> None:
    gateway = Gateway.open(bundle, upstream=upstream.url, options=GatewayOptions(queue=1, batch=1, batch_wait=0))
    assert gateway.gate.guard is not None
    runner: Any = gateway.gate.guard.runner
    release, good = threading.Event(), runner._run

    def slow(rgb: Any) -> GuardOutput:
        release.wait(600)
        return good(rgb)

    runner._run = slow
    with serving(gateway) as url:
        found: list[httpx.Response] = []
        send = lambda: found.append(httpx.post(f"{url}/v1/guard", json={"images": [SAFE_URL]}, timeout=600))  # noqa: E731
        threads = [threading.Thread(target=send) for _ in range(6)]
        for thread in threads:
            thread.start()
        until = time.monotonic() + 600
        while not found and time.monotonic() < until:
            time.sleep(0.01)
        release.set()
        for thread in threads:
            thread.join()
    statuses = sorted(response.status_code for response in found)
    assert statuses[0] == 200 and statuses[-1] == 503 and len(found) == 6
    refused(next(each for each in found if each.status_code == 503), 503, "1 images are waiting", "overloaded_error")


# -- remote images --------------------------------------------------------------------------------------


class _Images(BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        return

    def do_GET(self) -> None:
        self.server.paths.append((self.path, self.headers["host"]))  # type: ignore[attr-defined]
        if self.path == "/redirect":
            self.send_response(302)
            self.send_header("location", "/safe.png")
            self.end_headers()
            return
        content = png(SAFE) if self.path == "/safe.png" else b"x" * (3 * 2**20)
        self.send_response(200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        with contextlib.suppress(OSError):  # who is told too much hangs up
            self.wfile.write(content)


@pytest.fixture
def images() -> Iterator[Any]:
    server = HTTPServer(("127.0.0.1", 0), _Images)
    server.paths = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join(600)


def test_no_host_is_fetched_from_unless_it_is_named(address: str, upstream: Upstream, images: Any) -> None:
    port = images.server_address[1]
    for host in ("127.0.0.1", "localhost", "[::1]", "2130706433", "0x7f.1", "169.254.169.254", "x@127.0.0.1", "127.1"):
        refused(ask(address, {"messages": messages(f"http://{host}:{port}/safe.png")}), 400, "not fetched from there")
    assert not images.paths and not upstream.requests


def test_a_named_host_may_not_lead_inside(bundle: Path, upstream: Upstream, images: Any) -> None:
    port = images.server_address[1]
    options = GatewayOptions(hosts=frozenset({"localhost", "127.0.0.1"}), max_image_bytes=2 * 2**20, fetch_timeout=600)
    with serving(Gateway.open(bundle, upstream=upstream.url, options=options)) as url:
        for host in ("localhost", "127.0.0.1", "LOCALHOST."):
            refused(ask(url, {"messages": messages(f"http://{host}:{port}/safe.png")}), 400, "not fetched from there")
        for other in (
            f"http://localhost.evil:{port}/",
            f"http://evil@localhost:{port}/safe.png",
            "http://evil/#localhost",
        ):
            refused(ask(url, {"messages": messages(other)}), 400, "not fetched from there")
    assert not images.paths
    allowed = GatewayOptions(**{**vars(options), "private_hosts": True})
    with serving(Gateway.open(bundle, upstream=upstream.url, options=allowed)) as url:
        assert ask(url, {"messages": messages(f"http://localhost:{port}/safe.png")}).status_code == 200
        sent = upstream.requests[0]["messages"][0]["content"][0]["image_url"]["url"]
        assert sent.startswith("data:image/png;base64,"), "upstream gets the picture, not the URL"
        assert images.paths == [("/safe.png", f"localhost:{port}")]
        refused(ask(url, {"messages": messages(f"http://localhost:{port}/redirect")}), 400, "could not be fetched")
        assert len(images.paths) == 2, "the redirect was not followed"
        refused(ask(url, {"messages": messages(f"http://localhost:{port}/large")}), 413, "more than 2097152 bytes")
        refused(ask(url, {"messages": messages("http://localhost:1/safe.png")}), 400, "could not be fetched")


def test_options_that_make_no_sense() -> None:
    for wrong in ({"batch": 0}, {"guard_timeout": 0}, {"batch_wait": 99.0}, {"hosts": frozenset({"HTTP://x"})}):
        with pytest.raises(InputError):
            GatewayOptions(**wrong)  # type: ignore[arg-type]


def test_image_bytes_are_bounded_before_they_are_decoded(bundle: Path, upstream: Upstream) -> None:
    options = GatewayOptions(max_image_bytes=1000)
    with serving(Gateway.open(bundle, upstream=upstream.url, options=options)) as url:
        large = "data:image/png;base64," + base64.b64encode(b"x" * 5000).decode()
        refused(ask(url, {"messages": messages(large)}), 413, "more than 1000 bytes")
        assert json.loads(httpx.get(f"{url}/v1/models").text)["data"]
