"""Around every request: how many at once, how large, how it is counted and logged."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import time
import traceback
import uuid
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from typing import Any, TypeVar

from fastapi import Request
from starlette.exceptions import HTTPException

from runtimes.gateway.answers import JsonResponse, strict_json
from runtimes.gateway.options import GatewayOptions
from runtimes.gateway.refusal import Refusal, bad_request, overloaded
from runtimes.gateway.serving.json_bounds import JsonSizeError, check_json
from runtimes.gateway.serving.metrics import Metrics
from runtimes.gateway.serving.threads import off_loop
from safevlm.errors import InputError
from safevlm.machine import now
from safevlm.terminal.printable import shortened

__all__ = [
    "ACCESS",
    "DRAINING",
    "NOTES",
    "ClientGone",
    "Served",
    "gone",
    "listening",
    "while_connected",
    "read_body",
    "refused",
    "shutting_down",
    "unrouted",
    "unserved",
]

ACCESS = "safevlm.gateway.access"
"""The logger of access lines: JSON without images, prompts, answers, keys or addresses."""
NOTES = "safevlm"
"""Where a handler leaves what the access line says of its request."""
DRAINING = "safevlm_draining"
"""Set in the server's state, and so in the scope of each request that comes after the signal to end."""
MODELS = "/v1/models/"
UNCOUNTED = frozenset(("/healthz", "/livez", "/readyz", "/metrics"))
PATHS = UNCOUNTED | {
    *("/v1/chat/completions", "/v1/responses", "/v1/guard", "/v1/models", f"{MODELS}{{id}}", "/openapi.json")
}
METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"))
"""Others are made up by clients, who may put anything there."""
GONE = 499
BACKLOG = 2048
FAULT = Refusal(
    500, "server_error", "internal error of this server; the request was not answered.", code="server_error"
)
POLL_SECONDS = 0.25
MAX_NODES, MAX_DEPTH = 100_000, 100
"""Of a body's JSON: values, and arrays and objects within each other."""

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
        if not scope["path"].startswith(MODELS):
            scope["path"] = scope["path"].rstrip("/") or "/"  # a redirect would lose a body, and a proxy's scheme
        if scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}  # the server leaves the body out
        notes: dict[str, Any] = {"id": uuid.uuid4().hex}
        scope[NOTES] = notes
        status, answering, whole, begun = 500, False, False, time.perf_counter()
        place = contextlib.ExitStack()

        async def sending(message: MutableMapping[str, Any]) -> None:
            nonlocal status, answering, whole
            if message["type"] == "http.response.body" and not message.get("more_body"):
                place.close()  # before the last byte is out: its reader's next request finds the place free
                whole = True
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", notes["id"].encode())]
                answering = True
            await send(message)

        try:
            await self._admitted(scope, receive, sending, place)
            if not whole:
                notes["outcome"] = "client_gone"  # or it did not read
        except Exception as error:  # a bug of ours: told here, as the server would log its message
            _log_fault(notes["id"], error)
            notes["outcome"] = "server_error"
            if not answering:
                await _refused(FAULT)(scope, receive, sending)
        except asyncio.CancelledError:  # the time for shutting down is over
            notes["outcome"] = "cut_off"
            if not answering:
                await _refused(shutting_down())(scope, receive, sending)
        finally:
            place.close()
            self._note(scope, notes, status, (time.perf_counter() - begun) * 1000)

    async def _admitted(self, scope: Scope, receive: Any, send: Any, place: contextlib.ExitStack) -> None:
        """Serve, unless there is too much to do. What is turned away counts for nothing, however slow its body."""
        counted, refusal = scope["path"] not in UNCOUNTED, None
        if counted and scope.get("state", {}).get(DRAINING):
            refusal = shutting_down()
        elif counted and self._serving >= self.options.max_concurrent:
            refusal = overloaded(
                f"{self.options.max_concurrent} requests are being served, the maximum. Try again in a second."
            )
        if refusal is not None:
            await _thrown_away(receive, self.options)
            scope[NOTES]["outcome"] = refusal.code
            await _refused(refusal)(scope, receive, send)
            return
        if counted:
            self._count(1)
            place.callback(self._count, -1)
        await self.app(scope, receive, send)

    def _count(self, change: int) -> None:
        self._serving += change
        self.metrics.in_flight.set(self._serving)

    def _note(self, scope: Scope, notes: dict[str, Any], status: int, ms: float) -> None:
        path = f"{MODELS}{{id}}" if scope["path"].startswith(MODELS) else scope["path"]
        path = path if path in PATHS else "other"
        outcome = notes.get("outcome", _outcome(status))
        self.metrics.requests.labels(path, outcome).inc()
        if scope["path"] not in UNCOUNTED:
            self.metrics.total.observe(ms / 1000)
        if "client" in notes:
            self.metrics.clients.labels(notes["client"], outcome).inc()
        method = scope["method"] if scope["method"] in METHODS else "other"
        _log_access(method, path, status, **({"outcome": outcome, "ms": round(ms, 1)} | notes))


def unserved(refusal: Refusal, metrics: Metrics) -> str:
    """Count and log what was refused before it was a request: a head that is late or no HTTP. Return the line's id."""
    name, outcome = uuid.uuid4().hex, refusal.code or refusal.kind
    metrics.requests.labels("none", outcome).inc()
    _log_access("none", "none", refusal.status, outcome=outcome, id=name)
    return name


def _log_access(method: str, path: str, status: int, **more: Any) -> None:
    _access.info(json.dumps({"time": now(), "method": method, "path": path, "status": status, **more}))


def listening(host: str, port: int) -> socket.socket:
    """Return a socket that listens; port 0 is any that is free.

    Its protocol is named, by which asyncio knows that it may turn Nagle's algorithm off; else the second packet of
    every answer waits 40 ms for a delayed acknowledgement. Raises InputError for an address that cannot be had.
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
    except (OSError, UnicodeError) as error:  # a name that is none, such as a..b
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"the gateway cannot listen on --host {host} --port {port}: {reason}. Give another --host, or another "
            "--port (0: any free one)."
        ) from error
    return bound


async def _thrown_away(receive: Any, options: GatewayOptions) -> None:
    """Read a body without keeping it: an answer before its end would reset the connection, and not be read."""

    async def read() -> None:
        size = 0
        while size <= options.max_body:
            message = await receive()
            size += len(message.get("body", b""))
            if message["type"] != "http.request" or not message.get("more_body"):
                return

    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(read(), options.body_timeout)


def shutting_down() -> Refusal:
    """Return the refusal for a client that comes too late or whose time is over."""
    return Refusal(503, "overloaded_error", "this server is shutting down.", code="shutting_down", retry=1)


def _outcome(status: int) -> str:
    return "ok" if status < 400 else "refused" if status < 500 else "failed"


def _refused(refusal: Refusal) -> JsonResponse:
    return JsonResponse(refusal.body(), status_code=refusal.status, headers=refusal.headers)


async def refused(request: Request, error: Exception) -> JsonResponse:
    """Answer a Refusal: FastAPI's exception handler."""
    assert isinstance(error, Refusal)
    request.scope[NOTES]["outcome"] = error.code or error.kind
    return _refused(error)


async def gone(request: Request, _: Exception) -> JsonResponse:
    """End a request whose client has left."""
    request.scope[NOTES]["outcome"] = "client_gone"
    return JsonResponse({}, status_code=GONE)


async def unrouted(_: Request, error: Exception) -> JsonResponse:
    """Answer an unknown path or method, in OpenAI's shape instead of FastAPI's."""
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    if error.status_code == 405:
        told, code = f"use {headers.get('Allow', 'another method')}", "method_not_allowed"
    else:
        told, code = f"this server has {', '.join(sorted(PATHS))}", "not_found"
    found = _refused(bad_request(f"{error.detail}: {told}.", code=code, status=error.status_code))
    found.headers.update(headers)
    return found


def _log_fault(name: str, error: Exception) -> None:
    """Log where a bug was raised, without its message, which may quote the request."""
    trace = "".join(traceback.format_tb(error.__traceback__))
    logging.getLogger(__name__).error("request %s: %s\n%s", name, type(error).__name__, trace)


async def read_body(request: Request, options: GatewayOptions, parse: Callable[[Any, GatewayOptions], T]) -> T:
    """Return what ``parse`` makes of a request's JSON body, in a thread: a large one would hold up all others.

    Raises Refusal for a body that is too large, too slow, too deep or no JSON, and those of ``parse``; ClientGone.
    """
    packed = request.headers.get("content-encoding", "identity")
    if packed.strip().lower() not in ("", "identity"):
        raise bad_request(
            f"a body with 'content-encoding: {shortened(packed)}' is not accepted. Send it unencoded.",
            code="unsupported_content_encoding",
            status=415,
        )
    stated = request.headers.get("content-length", "0")
    too_large = bad_request(
        f"the body has more than {options.max_body} bytes, the maximum.", code="body_too_large", status=413
    )
    if not (stated.isascii() and stated.isdigit()) or int(stated) > options.max_body:
        raise too_large
    try:
        content = await asyncio.wait_for(_read(request, options.max_body, too_large), options.body_timeout)
    except asyncio.TimeoutError:
        raise bad_request("the body did not arrive in time.", code="body_timeout", status=408) from None
    return await off_loop(len(content), lambda: _parsed(content, options, parse))


def _parsed(content: bytes, options: GatewayOptions, parse: Callable[[Any, GatewayOptions], T]) -> T:
    try:
        check_json(content, nodes=MAX_NODES, depth=MAX_DEPTH)
        body = strict_json(content)
    except JsonSizeError as error:
        message = f"the body's JSON has {error}, the maximum."
        raise bad_request(message, code="json_too_large") from None
    except (ValueError, RecursionError):
        raise bad_request("the body is not JSON.") from None
    return parse(body, options)


async def _read(request: Request, limit: int, too_large: Refusal) -> bytes:
    from starlette.requests import ClientDisconnect

    pieces, size = [], 0
    try:
        async for piece in request.stream():
            size += len(piece)
            if size > limit:
                raise too_large
            pieces.append(piece)
    except ClientDisconnect:
        raise ClientGone from None
    return b"".join(pieces)


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
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
