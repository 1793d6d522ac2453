"""Servers of these tests, over real sockets: a gateway in a thread, and an upstream that does as it is told."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from calibration.holisafe_mini.scene import draw
from calibration.holisafe_mini.suite import build_suite
from runtimes.gateway.app import Gateway, create_app
from runtimes.gateway.serving.server import GatewayServer
from runtimes.gateway.serving.serving import listening

SUITE = build_suite("test", pairs=100, questions=0)
SAFE, UNSAFE = (
    draw(next(each for each in SUITE.pictures if (each.scene.label == 0) == safe).scene) for safe in (True, False)
)
ANSWER = "The square is red."


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def data_url(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


SAFE_URL, UNSAFE_URL = data_url(png(SAFE)), data_url(png(UNSAFE))


def noise(seed: int) -> str:
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)
    return data_url(png(Image.fromarray(pixels)))


def messages(*urls: str, text: str = "Where is the square?") -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


class Upstream(ThreadingHTTPServer):
    """An OpenAI-compatible server; ``behave`` writes the answer of a chat request, ``requests`` are those that came."""

    daemon_threads = True
    request_queue_size = 256  # of the default five, a burst of requests is broken off by the operating system

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Upstream)
        self.requests: list[dict[str, Any]] = []
        self.headers_seen: list[dict[str, str]] = []
        self.behave: Callable[[_Upstream, dict[str, Any]], None] = answer
        self.broken_off = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        self.broken_off += 1


class _Upstream(BaseHTTPRequestHandler):
    server: Upstream
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        return

    def do_GET(self) -> None:
        self.reply({"object": "list", "data": [{"id": "fake", "object": "model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.requests.append(body)
        self.server.headers_seen.append({name.lower(): value for name, value in self.headers.items()})
        self.server.behave(self, body)

    def reply(self, body: Any, status: int = 200, kind: str = "application/json") -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def begin_stream(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()

    def event(self, body: Any) -> None:
        self.wfile.write(b"data: " + (body if isinstance(body, bytes) else json.dumps(body).encode()) + b"\n\n")
        self.wfile.flush()


def piece(text: str, ended: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": ended}
    return {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "fake", "choices": [choice]}


def answer(handler: _Upstream, body: dict[str, Any]) -> None:
    """Answer as a model would."""
    if body.get("stream"):
        handler.begin_stream()
        handler.wfile.write(b": a comment\r\n\r\n")
        for word in ANSWER.split(" "):
            handler.event(piece(word + " "))
        handler.event(piece("", "stop"))
        handler.event(b"[DONE]")
        handler.close_connection = True
        return
    choice = {"index": 0, "message": {"role": "assistant", "content": ANSWER}, "finish_reason": "stop"}
    handler.reply({"id": "x", "object": "chat.completion", "created": 1, "model": "fake", "choices": [choice]})


@contextmanager
def upstream_server() -> Iterator[Upstream]:
    server = Upstream()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(600)


@contextmanager
def serving(gateway: Gateway) -> Iterator[str]:
    """Serve a gateway in a thread and yield its base URL, without ``/v1``."""
    server = GatewayServer(create_app(gateway), gateway.options)
    bound = listening("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    until = time.monotonic() + 600
    while not server.started:
        assert time.monotonic() < until and thread.is_alive(), "the gateway did not start"
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(600)
        bound.close()
        assert not thread.is_alive(), "the gateway did not end"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def bundle_of(name: str, folder: Path) -> Path:
    """Export the guard of a tiny checkpoint that taps its projector."""
    from export.onnx import ExportOptions, export_guard
    from safevlm.checkpoint.checkpoint import open_checkpoint

    export_guard(open_checkpoint(name), folder, ExportOptions(parity_images=1))
    return folder
