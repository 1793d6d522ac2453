"""The language model behind a gateway: any OpenAI-compatible server, by its URL.

Requests are passed on with the judged images in place of those that were sent. Few of the client's headers are passed
on; the key is, and it appears nowhere else. An answer that is no chat completion, or a stream that ends early or
holds garbage, is an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
import sys
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import httpx

from runtimes.gateway.answers import DONE, error_event, event, strict_json
from runtimes.gateway.options import GatewayOptions
from runtimes.gateway.refusal import Refusal, no_such_model, upstream_error
from runtimes.gateway.serving.json_bounds import check_json
from runtimes.gateway.serving.metrics import Metrics
from runtimes.gateway.serving.threads import off_loop
from runtimes.gateway.upstream.address import trusted, upstream_address
from runtimes.gateway.upstream.errors import MAX_ERROR, stated_error, upstream_words

__all__ = ["KV_PARAMS", "Events", "HttpUpstream", "Passed"]

KV_PARAMS = "kv_transfer_params"
"""Key of vLLM's answers that holds exact verdicts, with probabilities: never passed on."""
FORWARDED = ("authorization", "openai-organization", "openai-project", "x-request-id")
REQUEST_ID = re.compile(r"[\w.:/+=-]{1,200}", re.ASCII)
CONNECT_SECONDS = 10.0
IDLE_SECONDS = 2.0  # servers close an idle connection after five (uvicorn, Node): a request must not meet that
MAX_LINE = 4 * 2**20
FIELDS = (b"event:", b"id:", b"retry:")
"""Of server-sent events, beside ``data``: nothing that a client of chat completions reads."""
KEY_REFUSED = (401, 403)
TOLD = ("retry-after", "retry-after-ms")
"""Headers of an error that are passed on to the client."""
KEEP_ALIVE = b": keep-alive\n\n"
"""In place of an upstream's comments: they keep a connection open, whatever stands in them."""
MAX_NODES, MAX_DEPTH = 500_000, 100
"""Of an answer's JSON; the log probabilities of 20 tokens a place are many."""
PROBED_SECONDS = 1.0

NOT_SERVED = (404, 405)
NOT_NOW = (502, 503, 504)


@dataclass(frozen=True)
class Passed:
    """An upstream's own answer: status, JSON body, and the headers that are passed on."""

    status: int
    body: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)
    size: int = 0
    """Of its body, in bytes."""


class HttpUpstream:
    """A base URL such as ``http://127.0.0.1:8000/v1``; an asynchronous context manager.

    ``key`` is sent where the client sends none. Raises InputError as :func:`upstream_address` and :func:`trusted`.
    """

    def __init__(self, url: str, options: GatewayOptions, metrics: Metrics, *, key: str | None = None) -> None:
        address = upstream_address(url)
        self._trusted = trusted(address)
        self.url, self.options, self.metrics, self.key = str(address), options, metrics, key
        self._client: httpx.AsyncClient | None = None
        self._reaching = asyncio.Lock()
        self._reached = (-math.inf, False)

    async def __aenter__(self) -> HttpUpstream:
        kept = self.options.max_concurrent
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=kept, keepalive_expiry=IDLE_SECONDS)
        self._client = httpx.AsyncClient(verify=self._trusted, limits=limits, trust_env=False, follow_redirects=False)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._client is not None:
            await self._client.aclose()

    async def reachable(self) -> bool:
        """Say whether the upstream answers, and not that it does not just now (a model that is still being loaded).

        It is asked once a second, however often this is.
        """
        async with self._reaching:
            asked, answered = self._reached
            if time.monotonic() - asked < PROBED_SECONDS:
                return answered
            try:
                async with self._open().stream("GET", f"{self.url}/models", timeout=2.0) as response:
                    answered = response.status_code not in NOT_NOW
            except httpx.HTTPError:
                answered = False
            self._reached = (time.monotonic(), answered)
            return answered

    async def models(self, headers: Mapping[str, str], name: str | None = None) -> Passed:
        """Return what the upstream says of its models, or of one. Raises Refusal."""
        if name is None:
            return await self._models("", headers)
        leads_elsewhere = "%" in name or not {"", ".", ".."}.isdisjoint(name.split("/"))  # or may do so there
        if not leads_elsewhere:
            with contextlib.suppress(Refusal):
                found = await self._models(f"/{quote(name, safe='')}", headers)
                if "id" in found.body if found.status == httpx.codes.OK else found.status not in NOT_SERVED:
                    return found
        return _of_list(await self._models("", headers), name)  # all that llama-server and others serve

    async def _models(self, path: str, headers: Mapping[str, str]) -> Passed:
        more: dict[str, Any] = {"headers": self._headers(headers), "timeout": self._times(None)}
        return await self._whole(self._open().build_request("GET", f"{self.url}/models{path}", **more), headers)

    async def complete(self, body: dict[str, Any], headers: Mapping[str, str]) -> Passed:
        """Return the upstream's whole answer for the client. Raises as :meth:`whole`."""
        found = await self.whole(body, headers)
        found.body.pop(KV_PARAMS, None)
        return found

    async def whole(self, body: dict[str, Any], headers: Mapping[str, str]) -> Passed:
        """Return the upstream's whole answer. Raises Refusal for one that is none, and when it is down or slow."""
        found = await self._whole(await self._request(body, headers, None), headers)
        if found.status == httpx.codes.OK and not isinstance(found.body.get("choices"), list):
            raise self._broken("the upstream's answer is not a chat completion")
        return found

    async def stream(self, body: dict[str, Any], headers: Mapping[str, str]) -> Passed | Events:
        """Return the upstream's events, or its refusal to begin. Raises Refusal before anything was sent on."""
        sent = _Sent(self, await self._request(body, headers, self.options.idle_timeout))
        response = await sent.__aenter__()
        kind = response.headers.get("content-type", "").lower()
        if response.status_code == httpx.codes.OK and kind.startswith("text/event-stream"):
            return Events(self._events(response, self._hidden(headers, response)), sent)
        try:
            found = await asyncio.wait_for(self._passed(response, headers), self.options.total_timeout)
        except asyncio.TimeoutError:
            raise self._slow() from None
        finally:
            await sent.__aexit__(None, None, None)
        if found.status == httpx.codes.OK:
            raise self._broken("the upstream answered a streamed request without a stream")
        return found

    async def _whole(self, request: httpx.Request, headers: Mapping[str, str]) -> Passed:
        """Send a request and read its answer, within the total time; there is none for its silence."""

        async def answered() -> Passed:
            async with _Sent(self, request) as response:
                return await self._passed(response, headers)

        try:
            return await asyncio.wait_for(answered(), self.options.total_timeout)
        except asyncio.TimeoutError:
            raise self._slow() from None

    async def _passed(self, response: httpx.Response, headers: Mapping[str, str]) -> Passed:
        """Read an answer to its end, and check that it is one; an error keeps its status and words."""
        content, status = bytearray(), response.status_code
        try:
            async for piece in response.aiter_bytes():
                content += piece
                if len(content) > self.options.max_reply:
                    raise self._too_long()
        except httpx.HTTPError as error:
            raise self._failed(error) from None
        hidden = self._hidden(headers, response)
        if status in KEY_REFUSED and hidden is not None:
            raise self._broken("the upstream refuses this server's key")  # its words may quote part of the key
        if 400 <= status < 600:
            told = {name: response.headers[name] for name in TOLD if name in response.headers}
            return Passed(status, upstream_words(status, bytes(content[:MAX_ERROR]), hidden), told)
        found = await self._object(bytes(content))
        if status != httpx.codes.OK:
            raise self._broken(f"the upstream answered with HTTP {status}")
        return Passed(status, found, size=len(content))

    async def _events(self, response: httpx.Response, hidden: bytes | None) -> AsyncIterator[bytes]:
        """Pass on events that are whole; whatever ends them early ends in an event that says so."""
        until = time.monotonic() + self.options.total_timeout
        try:
            async for line in _lines(response, self.options.max_reply, until):
                if line.startswith(b":"):
                    yield KEEP_ALIVE
                if not line or line.startswith((b":", *FIELDS)):
                    continue
                if not line.startswith(b"data:"):
                    raise self._broken("the upstream's stream holds something other than events")
                data = line[len(b"data:") :].strip()
                if data == b"[DONE]":
                    yield DONE
                    return
                found = await self._object(data)
                error = stated_error(found, response.status_code, hidden)
                if KV_PARAMS in found:
                    del found[KV_PARAMS]
                    data = json.dumps(found).encode("ascii")
                yield b"data: " + data + b"\n\n" if error is None else event(error)
            raise self._broken("the upstream's stream ended before it was complete")
        except _TooLong:
            yield error_event(self._too_long())
        except asyncio.TimeoutError:
            yield error_event(self._slow())
        except httpx.HTTPError as failed:
            yield error_event(self._failed(failed))
        except Refusal as refusal:
            yield error_event(refusal)

    # -- parts ------------------------------------------------------------------------------------------

    def _open(self) -> httpx.AsyncClient:
        assert self._client is not None, "entered first"
        return self._client

    def _headers(self, given: Mapping[str, str]) -> dict[str, bytes]:
        kept = {name: given[name].encode("latin-1") for name in FORWARDED if name in given}
        if not REQUEST_ID.fullmatch(given.get("x-request-id", "")):
            kept.pop("x-request-id", None)  # it would stand in the upstream's logs
        if "authorization" not in kept and self.key is not None:
            kept["authorization"] = f"Bearer {self.key}".encode("latin-1")
        return {**kept, "content-type": b"application/json", "accept-encoding": b"identity"}

    def _hidden(self, headers: Mapping[str, str], response: httpx.Response) -> bytes | None:
        """Return this server's key where it was sent: no error may quote it."""
        sent = response.request.headers.get("authorization")
        return None if sent is None or "authorization" in headers else sent.removeprefix("Bearer ").encode("latin-1")

    async def _request(self, body: dict[str, Any], headers: Mapping[str, str], silence: float | None) -> httpx.Request:
        came = headers.get("content-length", "")  # what is written is at most half as large again
        size = int(came) if came.isascii() and came.isdigit() else sys.maxsize
        content = await off_loop(size, lambda: json.dumps(body).encode("ascii"))
        url = f"{self.url}/chat/completions"
        more: dict[str, Any] = {"headers": self._headers(headers), "timeout": self._times(silence)}
        return self._open().build_request("POST", url, content=content, **more)

    def _times(self, silence: float | None) -> httpx.Timeout:
        return httpx.Timeout(silence, connect=CONNECT_SECONDS, pool=self.options.total_timeout)

    async def _object(self, content: bytes) -> dict[str, Any]:
        try:
            found = await off_loop(len(content), lambda: _read_json(content))
        except (ValueError, RecursionError):
            raise self._broken("the upstream's answer is not JSON") from None
        if not isinstance(found, dict):
            raise self._broken("the upstream's answer is not a JSON object")
        return found

    def _too_long(self) -> Refusal:
        return self._broken(f"the upstream's answer has more than {self.options.max_reply} bytes")

    def _broken(self, message: str) -> Refusal:
        self.metrics.upstream.labels("broken").inc()
        return upstream_error(f"{message}.")

    def _slow(self) -> Refusal:
        self.metrics.upstream.labels("slow").inc()
        return upstream_error("the upstream did not answer in time.", status=504, code="upstream_timeout")

    def _failed(self, error: httpx.HTTPError) -> Refusal:
        if isinstance(error, httpx.TimeoutException):
            return self._slow()
        if isinstance(error, httpx.ConnectError):
            self.metrics.upstream.labels("down").inc()
            return upstream_error("the upstream cannot be reached.", code="upstream_unreachable")
        self.metrics.upstream.labels("died").inc()
        return upstream_error("the connection to the upstream broke.")


def _of_list(listed: Passed, name: str) -> Passed:
    """Return one model of a list of models. Raises Refusal, 404, where it is not in there."""
    if listed.status != httpx.codes.OK:
        return listed
    models = listed.body.get("data")
    for model in models if isinstance(models, list) else ():
        if isinstance(model, dict) and model.get("id") == name:
            return Passed(listed.status, model)
    raise no_such_model(name)


class Events:
    """The events of a stream; close it however it ends, even where none was read."""

    def __init__(self, events: AsyncIterator[bytes], sent: _Sent) -> None:
        self._events, self._sent = events, sent

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._events

    async def aclose(self) -> None:
        """End the request upstream."""
        await self._sent.__aexit__(None, None, None)


class _Sent:
    """A request on its way; an asynchronous context manager around its open answer."""

    def __init__(self, upstream: HttpUpstream, request: httpx.Request) -> None:
        self._upstream, self._request = upstream, request
        self._response: httpx.Response | None = None

    async def __aenter__(self) -> httpx.Response:
        upstream = self._upstream
        try:
            with upstream.metrics.answer.time():
                self._response = await upstream._open().send(self._request, stream=True)
        except httpx.HTTPError as error:
            raise upstream._failed(error) from None
        if self._response.is_redirect:
            await self._response.aclose()
            raise upstream._broken("the upstream answered with a redirect, which is not followed")
        return self._response

    async def __aexit__(self, *_: object) -> None:
        if self._response is not None:
            await self._response.aclose()


class _TooLong(Exception):  # noqa: N818  # control flow
    """A stream has more bytes than an answer may have."""


async def _lines(response: httpx.Response, limit: int, until: float) -> AsyncIterator[bytes]:
    """Yield lines without their ends; one that is endless is cut, and then is no event.

    Raises _TooLong for more than ``limit`` bytes, and TimeoutError for a piece that has not come by ``until``.
    """
    rest, size, pieces = b"", 0, response.aiter_bytes()
    while (piece := await asyncio.wait_for(anext(pieces, None), max(0.0, until - time.monotonic()))) is not None:
        size += len(piece)
        if size > limit:
            raise _TooLong
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line.rstrip(b"\r")
        if len(rest) > MAX_LINE:
            yield rest
            rest = b""
    if rest:
        yield rest


def _read_json(content: bytes) -> Any:
    check_json(content, nodes=MAX_NODES, depth=MAX_DEPTH)
    return strict_json(content)
