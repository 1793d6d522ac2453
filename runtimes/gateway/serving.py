"""Around every request: how many at once, how large, how it is counted and logged."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import socket
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse

from models.errors import InputError
from models.machine import now
from runtimes.gateway.metrics import Metrics
from runtimes.gateway.options import GatewayOptions
from runtimes.gateway.refusal import Refusal, bad_request, overloaded

__all__ = ["ACCESS", "ClientGone", "Served", "check_key", "listening", "or_gone", "read_json"]

ACCESS = "safevlm.gateway.access"
"""The logger of access lines: JSON without images, prompts, answers, keys or addresses."""
NOTES = "safevlm"
"""Where a handler leaves what the access line says of its request."""
PATHS = frozenset(("/v1/chat/completions", "/v1/guard", "/v1/models", "/healthz", "/metrics"))
UNCOUNTED = frozenset(("/healthz", "/metrics"))
GONE = 499
BACKLOG = 2048
POLL_SECONDS = 0.25

_access = logging.getLogger(ACCESS)
Scope = MutableMapping[str, Any]
App = Callable[[Scope, Any, Any], Awaitable[None]]
T = TypeVar("T")


class ClientGone(Exception):  # noqa: N818  # nobody is there to be told
    """The client has closed the connection."""


class Served:
    """ASGI: bound what is served at once, and write one line for each request."""

    def __init__(self, app: App, options: GatewayOptions, metrics: Metrics) -> None:
        self.app, self.options, self.metrics = app, options, metrics
        self._serving = 0

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        notes: dict[str, Any] = {"id": uuid.uuid4().hex}
        scope[NOTES] = notes
        status, begun = 500, time.perf_counter()

        async def sending(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", notes["id"].encode())]
            await send(message)

        counted = scope["path"] not in UNCOUNTED
        self._serving += counted
        self.metrics.in_flight.set(self._serving)
        try:
            if counted and self._serving > self.options.max_concurrent:
                refusal = overloaded(f"{self.options.max_concurrent} requests are being served; try again in a second.")
                await _thrown_away(receive, self.options.max_body)
                await _refused(refusal)(scope, receive, sending)
            else:
                await self.app(scope, receive, sending)
        finally:
            self._serving -= counted
            self.metrics.in_flight.set(self._serving)
            path = scope["path"] if scope["path"] in PATHS else "other"
            outcome = notes.get("outcome", _outcome(status))
            self.metrics.requests.labels(path, outcome).inc()
            line = {
                "time": now(),
                "method": scope["method"],
                "path": path,
                "status": status,
                "outcome": outcome,
                "ms": round((time.perf_counter() - begun) * 1000, 1),
                **{key: value for key, value in notes.items() if key != "outcome"},
            }
            _access.info(json.dumps(line))


def listening(host: str, port: int) -> socket.socket:
    """Return a socket that listens; port 0 is any that is free.

    Its protocol is named, by which asyncio knows that it may turn Nagle's algorithm off; else the second packet of
    every answer waits 40 ms for a delayed acknowledgement. Errors: InputError for an address that cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
            bound.listen(BACKLOG)
        except OSError:
            bound.close()
            raise
    except OSError as error:
        raise InputError(f"--host {host} --port {port}: {error.strerror or error}. Take another.") from error
    return bound


async def _thrown_away(receive: Any, most: int) -> None:
    """Read a body without keeping it: an answer before its end would reset the connection, and not be read."""
    size = 0
    while size <= most:
        message = await receive()
        size += len(message.get("body", b""))
        if message["type"] != "http.request" or not message.get("more_body"):
            return


def _outcome(status: int) -> str:
    return "ok" if status < 400 else "refused" if status < 500 else "failed"


def _refused(refusal: Refusal) -> JSONResponse:
    return JSONResponse(refusal.body(), status_code=refusal.status, headers=refusal.headers)


async def refused(request: Request, error: Exception) -> JSONResponse:
    """Answer a Refusal: FastAPI's exception handler."""
    assert isinstance(error, Refusal)
    request.scope[NOTES]["outcome"] = error.code or error.kind
    return _refused(error)


async def gone(_: Request, __: Exception) -> JSONResponse:
    """End a request whose client has left."""
    return JSONResponse({}, status_code=GONE)


async def broken(request: Request, error: Exception) -> JSONResponse:
    """Answer a bug of ours: without the message, which may quote the request."""
    logging.getLogger(__name__).error("%s: %s", request.scope[NOTES]["id"], type(error).__name__, exc_info=error)
    return _refused(Refusal(500, "server_error", "a fault of this server; nothing was answered.", code="server_error"))


def check_key(request: Request, key: str | None) -> None:
    """Raise Refusal, 401, unless the client shows the key, where one is asked for."""
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if key is not None and not hmac.compare_digest(given.encode(), key.encode()):
        raise Refusal(401, "authentication_error", "the API key is missing or wrong.", code="invalid_api_key")


async def read_json(request: Request, options: GatewayOptions) -> Any:
    """Return a request's JSON body. Errors: Refusal for one that is too large, too slow or no JSON; ClientGone."""
    stated = request.headers.get("content-length", "0")
    too_large = bad_request(
        f"the body has more than {options.max_body} bytes; that many are allowed.", code="body_too_large", status=413
    )
    if not stated.isdigit() or int(stated) > options.max_body:
        raise too_large
    try:
        content = await asyncio.wait_for(_read(request, options.max_body, too_large), options.body_timeout)
    except asyncio.TimeoutError:
        raise bad_request("the body did not come in time.", code="body_timeout", status=408) from None
    try:
        return await asyncio.to_thread(json.loads, content)
    except (ValueError, RecursionError):
        raise bad_request("the body is not JSON.") from None


async def _read(request: Request, limit: int, too_large: Refusal) -> bytes:
    from starlette.requests import ClientDisconnect

    content = bytearray()
    try:
        async for piece in request.stream():
            content += piece
            if len(content) > limit:
                raise too_large
    except ClientDisconnect:
        raise ClientGone from None
    return bytes(content)


async def or_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await work, and end it when the client leaves: ClientGone."""
    task = asyncio.create_task(work)
    try:
        while True:
            done, _ = await asyncio.wait({task}, timeout=POLL_SECONDS)
            if done:
                return task.result()
            if await request.is_disconnected():
                raise ClientGone
    finally:
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
