"""The servers around a measured gateway, each a process of its own: an upstream that answers at once, nginx."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safevlm.errors import MissingExtraError, SafeVLMError
from safevlm.terminal.child import module_arguments

__all__ = ["Server", "nginx", "require_httpx", "server", "upstream"]

START_SECONDS = 60.0
NGINX = """
daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log;
events {{ worker_connections 4096; }}
http {{
  access_log off; client_max_body_size 64m; client_body_buffer_size 1m;
  client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder}; uwsgi_temp_path {folder};
  scgi_temp_path {folder};
  upstream model {{ server {address}; keepalive 128; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{ proxy_pass http://model; proxy_http_version 1.1; proxy_set_header Connection ""; }}
  }}
}}
"""


@dataclass(frozen=True)
class Server:
    """A process that serves at ``url``."""

    url: str
    pid: int


@contextmanager
def server(command: Sequence[str], what: str) -> Iterator[Server]:
    """Start a Python server that says ``serving on URL``, and end it. Raises SafeVLMError if it does not start."""
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    reader = threading.Thread(target=process.stderr.read, daemon=True)  # a full pipe would stop the server
    try:
        seen = []
        for line in process.stderr:
            if line.startswith("serving on "):
                break
            seen.append(line)
        else:
            raise SafeVLMError(f"the {what} did not start: {''.join(seen)}")
        url = line.removeprefix("serving on ").strip()
        reader.start()
        _wait(url, process, what)
        yield Server(url, process.pid)
    finally:
        process.terminate()
        process.wait()
        if reader.is_alive():
            reader.join()
        process.stderr.close()


@contextmanager
def upstream() -> Iterator[Server]:
    """Start an upstream that answers every chat request at once with the same text."""
    with server(module_arguments("benchmarks.speed.gateway_servers"), "upstream") as started:
        yield started


@contextmanager
def nginx(behind: str) -> Iterator[Server | None]:
    """Start nginx as a proxy that passes everything on to ``behind``; None where it is not installed."""
    program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="safevlm-nginx-") as folder:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        settings = Path(folder) / "nginx.conf"
        settings.write_text(NGINX.format(folder=folder, port=port, address=behind.removeprefix("http://")))
        Path(folder).chmod(0o777)  # its workers are another user's
        process = subprocess.Popen(
            [program, "-c", str(settings), "-e", f"{folder}/start.log"], stderr=subprocess.DEVNULL
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(url, process, "nginx")
            yield Server(url, process.pid)
        finally:
            process.terminate()
            process.wait()


def _wait(url: str, process: subprocess.Popen[Any], what: str) -> None:
    httpx = require_httpx()
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            httpx.get(f"{url}/healthz", timeout=5.0, trust_env=False)
            return
        time.sleep(0.05)
    raise SafeVLMError(f"the {what} did not start within {START_SECONDS:g} s")


def require_httpx() -> Any:
    """Return httpx. Raises MissingExtraError."""
    try:
        import httpx
    except ImportError as error:
        raise MissingExtraError("httpx", "gateway", "asking a gateway") from error
    return httpx


def serve_upstream() -> None:
    """Serve an upstream that answers at once: the command of the upstream's process."""
    import uvicorn

    from runtimes.gateway.serving.serving import listening

    choice = {"index": 0, "message": {"role": "assistant", "content": "Yes."}, "finish_reason": "stop"}
    body = {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        while (await receive()).get("more_body"):
            pass
        content = json.dumps(body).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical", lifespan="off")
    bound = listening("127.0.0.1", 0)
    print(f"serving on http://127.0.0.1:{bound.getsockname()[1]}", file=sys.stderr, flush=True)  # noqa: T201
    uvicorn.Server(config).run(sockets=[bound])


if __name__ == "__main__":
    serve_upstream()
