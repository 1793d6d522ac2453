"""The language model behind a gateway: any OpenAI-compatible server, by its URL.

Requests go on with the judged pictures in place of what was sent. Of the client's headers few go on; the key does, and
stands nowhere else. An answer that is no chat completion, or a stream that ends early or holds garbage, is an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import httpx

from models.errors import InputError
from runtimes.gateway.answers import DONE, error_event, strict_json
from runtimes.gateway.metrics import Metrics
from runtimes.gateway.options import GatewayOptions
from runtimes.gateway.refusal import Refusal, no_such_model, upstream_error

__all__ = ["Events", "HttpUpstream", "Passed"]

FORWARDED = ("authorization", "openai-organization", "openai-project", "x-request-id")
CONNECT_SECONDS = 10.0
MAX_LINE = 4 * 2**20
FIELDS = (b"event:", b"id:", b"retry:")
"""Of server-sent events, beside ``data``: nothing that a client of chat completions reads."""
KEY_REFUSED = (401, 403)
NOT_SERVED = (404, 405)


@dataclass(frozen=True)
class Passed:
    """An upstream's own answer: status, JSON body, and the headers that go on."""

    status: int
    body: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)


class HttpUpstream:
    """A base URL such as ``http://127.0.0.1:8000/v1``; an asynchronous context manager.

    ``key`` is sent where the client sends none. Errors: InputError for an address that is no http or https URL, or
    that holds a name, password or query.
    """

    def __init__(self, url: str, options: GatewayOptions, metrics: Metrics, *, key: str | None = None) -> None:
        try:
            parsed = httpx.URL(url.rstrip("/"))
        except (httpx.InvalidURL, ValueError) as error:
            raise InputError(f"--upstream is no URL ({error}); such as http://127.0.0.1:8000/v1.") from None
        if parsed.scheme not in ("http", "https") or not parsed.host or parsed.userinfo or parsed.query:
            raise InputError(
                "--upstream must be an http(s) address without user name, password or query, such as "
                "http://127.0.0.1:8000/v1. A key goes into the environment variable of --upstream-key-env."
            )
        self.url, self.options, self.metrics, self._key = str(parsed), options, metrics, key
        self._client: httpx.AsyncClient | None = None

    async def __aenter__(self) -> HttpUpstream:
        times = httpx.Timeout(self.options.idle_timeout, connect=CONNECT_SECONDS, pool=self.options.total_timeout)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=self.options.max_concurrent)
        self._client = httpx.AsyncClient(timeout=times, limits=limits, trust_env=False, follow_redirects=False)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._client is not None:
            await self._client.aclose()

    async def reachable(self) -> bool:
        """Say whether the upstream answers at all."""
        try:
            async with self._open().stream("GET", f"{self.url}/models", timeout=2.0):
                return True
        except httpx.HTTPError:
            return False

    async def models(self, headers: Mapping[str, str], name: str | None = None) -> Passed:
        """Return what the upstream says of its models, or of one. Errors: Refusal."""
        if name is None:
            return await self._models("", headers)
        if "%" in name or not {"", ".", ".."}.isdisjoint(name.split("/")):  # leads elsewhere, or may do so there
            raise no_such_model(name)
        with contextlib.suppress(Refusal):
            found = await self._models(f"/{quote(name, safe='')}", headers)
            if "id" in found.body if found.status == httpx.codes.OK else found.status not in NOT_SERVED:
                return found
        return _of_list(await self._models("", headers), name)  # several servers serve the list alone

    async def _models(self, path: str, headers: Mapping[str, str]) -> Passed:
        url = f"{self.url}/models{path}"
        request = self._open().build_request("GET", url, headers=self._headers(headers))
        async with _Sent(self, request) as response:
            return await self._passed(response, headers)

    async def complete(self, body: dict[str, Any], headers: Mapping[str, str]) -> Passed:
        """Return the upstream's whole answer. Errors: Refusal for one that is none, and when it is down or slow."""
        async with _Sent(self, await self._request(body, headers)) as response:
            found = await self._passed(response, headers)
        if found.status == httpx.codes.OK and not isinstance(found.body.get("choices"), list):
            raise self._broken("what the upstream answered is no chat completion")
        return found

    async def stream(self, body: dict[str, Any], headers: Mapping[str, str]) -> Passed | Events:
        """Return the upstream's events, or its refusal to begin. Errors: Refusal before anything was sent on."""
        sent = _Sent(self, await self._request(body, headers))
        response = await sent.__aenter__()
        kind = response.headers.get("content-type", "")
        if response.status_code == httpx.codes.OK and kind.startswith("text/event-stream"):
            return Events(self._events(response), sent)
        try:
            found = await self._passed(response, headers)
        finally:
            await sent.__aexit__(None, None, None)
        if found.status == httpx.codes.OK:
            raise self._broken("the upstream answered a stream with no events")
        return found

    async def _passed(self, response: httpx.Response, headers: Mapping[str, str]) -> Passed:
        """Read an answer to its end, and check that it is one; an error is passed on where it is the client's."""
        content, begun = bytearray(), time.monotonic()
        try:
            async for piece in response.aiter_bytes():
                content += piece
                self._check(len(content), begun)
        except httpx.HTTPError as error:
            raise self._failed(error) from None
        status = response.status_code
        if status in KEY_REFUSED and "authorization" not in headers and self._key is not None:
            raise self._broken("the upstream refuses this server's key")  # its words may quote the key
        found = self._object(bytes(content))
        if status != httpx.codes.OK and "error" not in found:
            raise self._broken(f"the upstream answered with HTTP {status}")
        again = response.headers.get("retry-after")
        return Passed(status, found, {} if again is None else {"Retry-After": again})

    async def _events(self, response: httpx.Response) -> AsyncIterator[bytes]:
        """Pass on events that are whole; whatever ends them early ends in an event that says so."""
        begun = time.monotonic()
        try:
            async for line in _lines(response, lambda size: self._check(size, begun)):
                if not line or line.startswith(b":") or line.startswith(FIELDS):
                    continue
                if not line.startswith(b"data:"):
                    raise self._broken("the upstream's stream holds something other than events")
                data = line[len(b"data:") :].strip()
                if data == b"[DONE]":
                    yield DONE
                    return
                self._object(data)
                yield b"data: " + data + b"\n\n"
            raise self._broken("the upstream's stream ended before its end was told")
        except httpx.HTTPError as error:
            yield error_event(self._failed(error))
        except Refusal as refusal:
            yield error_event(refusal)

    # -- parts ------------------------------------------------------------------------------------------

    def _open(self) -> httpx.AsyncClient:
        assert self._client is not None, "entered first"
        return self._client

    def _headers(self, given: Mapping[str, str]) -> dict[str, str]:
        kept = {name: given[name] for name in FORWARDED if name in given}
        if "authorization" not in kept and self._key is not None:
            kept["authorization"] = f"Bearer {self._key}"
        return {**kept, "content-type": "application/json", "accept-encoding": "identity"}

    async def _request(self, body: dict[str, Any], headers: Mapping[str, str]) -> httpx.Request:
        content = await asyncio.to_thread(lambda: json.dumps(body).encode("ascii"))  # pictures are large
        url = f"{self.url}/chat/completions"
        return self._open().build_request("POST", url, content=content, headers=self._headers(headers))

    def _check(self, size: int, begun: float) -> None:
        if size > self.options.max_reply:
            raise self._broken(f"the upstream's answer has more than {self.options.max_reply} bytes")
        if time.monotonic() - begun > self.options.total_timeout:
            raise self._slow()

    def _object(self, content: bytes) -> dict[str, Any]:
        try:
            found = strict_json(content)
        except (ValueError, RecursionError):
            raise self._broken("what the upstream answered is not JSON") from None
        if not isinstance(found, dict):
            raise self._broken("what the upstream answered is no JSON object")
        return found

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
    """Return one model of a list of models. Errors: Refusal, 404, where it is not in there."""
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
            self._response = await upstream._open().send(self._request, stream=True)
        except httpx.HTTPError as error:
            raise upstream._failed(error) from None
        if self._response.is_redirect:
            await self._response.aclose()
            raise upstream._broken("the upstream redirects, which is not followed")
        return self._response

    async def __aexit__(self, *_: object) -> None:
        if self._response is not None:
            await self._response.aclose()


async def _lines(response: httpx.Response, check: Callable[[int], None]) -> AsyncIterator[bytes]:
    """Yield lines without their ends; one that is endless is cut, and then is no event.

    ``check`` is told how many bytes came so far, with each piece: a line that drips in takes time, too.
    """
    rest, size = b"", 0
    async for piece in response.aiter_bytes():
        size += len(piece)
        check(size)
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line.rstrip(b"\r")
        if len(rest) > MAX_LINE:
            yield rest
            rest = b""
    if rest:
        yield rest
