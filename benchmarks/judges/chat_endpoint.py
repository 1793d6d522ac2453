"""One question to an OpenAI-compatible server: ``POST {base}/chat/completions``, with patience and a bound on it all.

What can go wrong is a :class:`Reply` that says why, never an exception, but for a refused key: nothing would come of
any other question. The key is only sent; it is never in messages, logs or files.

httpx and not the openai client, whose retries do not bound a reply's bytes or the time of a whole try, and whose errors
quote what a server sends, which may be the key.
"""

from __future__ import annotations

import asyncio
import datetime
import email.utils
import json
import logging
import math
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from safevlm.errors import InputError

__all__ = ["ChatEndpoint", "ChatServer", "Patience", "Reply"]

MAX_REPLY_BYTES = 2**20
SHOWN = 160
TRY_AGAIN = frozenset((408, 409, 425, 429, 500, 502, 503, 504, 529))
"""Statuses that may pass: time-outs, conflicts, limits, faults and overload of the server."""
OF_THE_REQUEST = frozenset((400, 403, 413, 415, 422))
"""Statuses that a server gives one request for what is in it (403: content filters of some); others concern all."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long to wait, in seconds. The wait before try k is ``base`` · 2^(k-2), at most ``longest``, and half of it is
    random; a server that names a time (Retry-After) is waited for as long, unless that is over ``longest``."""

    tries: int = 5
    timeout: float = 60.0
    """Time limit of one try, from the first byte sent to the last received."""
    base: float = 1.0
    longest: float = 60.0

    def __post_init__(self) -> None:
        if self.tries < 1:
            raise InputError(f"tries is {self.tries}; it must be at least 1.")
        for name in ("timeout", "base", "longest"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"{name} is {value}; it must be a number of seconds above 0.")


@dataclass(frozen=True, kw_only=True)
class ChatServer:
    """Where to ask. ``key_variable`` names the environment variable that ``key`` came from.

    Raises InputError for an address that is no http or https URL, or carries a name, password or query, which would
    end up in logs.
    """

    url: str
    key: str | None = field(default=None, repr=False)
    key_variable: str = "OPENAI_API_KEY"
    patience: Patience = field(default_factory=Patience)

    def __post_init__(self) -> None:
        try:
            parsed = httpx.URL(self.url)
        except (httpx.InvalidURL, TypeError) as error:
            raise InputError(
                f"the endpoint's address is not a URL ({error}). Give one such as http://127.0.0.1:8000/v1."
            ) from None
        if parsed.userinfo or parsed.query or parsed.fragment:
            raise InputError(
                "the endpoint's address holds a user name, password, query or fragment. Give it without them, and "
                f"put the key into the environment variable {self.key_variable}."
            )
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise InputError(
                f"the endpoint {self.url!r} is not an http(s) address. Give one such as http://127.0.0.1:8000/v1."
            )

    @property
    def target(self) -> str:
        """The URL that questions are sent to; a base that names it already is taken as it is."""
        base, path = self.url.rstrip("/"), "/chat/completions"
        return base if base.endswith(path) else base + path


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What came back: ``text``, or None and ``why`` (``reason: detail``).

    ``down``: the failure is the server's and not this question's, so the next one will hardly fare better.
    ``ended`` is the server's own word for why the reply ends, such as ``stop``, ``length`` or ``content_filter``.
    """

    text: str | None = None
    why: str | None = None
    down: bool = False
    ended: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Later:
    """A failure that may pass, and how long the server wants to be left alone."""

    why: str
    seconds: float | None = None


class ChatEndpoint:
    """An open connection to a server, for one event loop; an asynchronous context manager.

    ``sleep`` waits between tries. ``any_end`` takes replies that were cut off at max_tokens, are empty, or were
    withheld by a content filter as they are; else they are failures, since a judge's word must be whole.
    """

    def __init__(
        self,
        server: ChatServer,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        any_end: bool = False,
    ) -> None:
        self.server = server
        self.any_end = any_end
        self._sleep = sleep
        self._client: httpx.AsyncClient | None = None

    async def __aenter__(self) -> ChatEndpoint:
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self.server.key is not None:
            headers["Authorization"] = f"Bearer {self.server.key}"
        self._client = httpx.AsyncClient(headers=headers, timeout=self.server.patience.timeout)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._client is not None:
            await self._client.aclose()

    async def ask(self, body: bytes) -> Reply:
        """Send a request (JSON) and return the reply's text. Raises InputError when the key is refused."""
        patience = self.server.patience
        for number in range(1, patience.tries + 1):
            found = await self._once(body)
            if isinstance(found, Reply):
                return found
            wait = found.seconds
            if wait is not None and wait > patience.longest:
                return Reply(
                    why=f"{found.why}, retry after {wait:.0f} s (more than the longest wait, {patience.longest:g} s)",
                    down=True,
                )
            if number < patience.tries:
                wait = _back_off(number, patience) if wait is None else wait
                _log.info("%s; trying again in %.1f s", found.why, wait)
                await self._sleep(wait)
        return Reply(why=f"{found.why} ({patience.tries} tries)", down=True)

    def clean(self, text: str) -> str:
        """Return one short line of a server's text, without the key should the server repeat it."""
        if self.server.key is not None:
            text = text.replace(self.server.key, "[key]")
        line = " ".join(text.split())
        return line if len(line) <= SHOWN else line[:SHOWN] + "…"

    async def _once(self, body: bytes) -> Reply | _Later:
        timeout = self.server.patience.timeout
        try:
            response, content = await asyncio.wait_for(self._post(body), timeout)
        except (asyncio.TimeoutError, httpx.TimeoutException):
            return _Later(why=f"timed out: no complete reply within {timeout:g} s")
        except httpx.ConnectError as error:
            return _Later(why=f"not reachable: {self.clean(str(error))}")
        except httpx.TransportError as error:  # cut off, reset, no HTTP
            return _Later(why=f"connection broke: {self.clean(str(error)) or type(error).__name__}")
        except httpx.DecodingError:
            return Reply(why="not a chat completion: the body cannot be decompressed")
        if len(content) > MAX_REPLY_BYTES:
            return Reply(why=f"not a chat completion: more than {MAX_REPLY_BYTES} bytes")
        if response.status_code != httpx.codes.OK:
            return self._refused(response, content)
        return self._text(content)

    async def _post(self, body: bytes) -> tuple[httpx.Response, bytes]:
        assert self._client is not None, "entered first"
        async with self._client.stream("POST", self.server.target, content=body) as response:
            content = bytearray()
            async for chunk in response.aiter_bytes():
                content += chunk
                if len(content) > MAX_REPLY_BYTES:
                    break
            return response, bytes(content)

    def _refused(self, response: httpx.Response, content: bytes) -> Reply | _Later:
        status = response.status_code
        if status == httpx.codes.UNAUTHORIZED:
            has = "the key in" if self.server.key is not None else "a request without a key; set"
            raise InputError(
                f"{self.server.url} refuses {has} the environment variable {self.server.key_variable} (HTTP 401). The "
                "scores so far are kept: continue with --resume."
            )
        told = self.clean(_message(content))
        detail = f"HTTP {status}" + (f", {told}" if told else "")
        if status in TRY_AGAIN:
            reason = "rate limited" if status == httpx.codes.TOO_MANY_REQUESTS else "server error"
            return _Later(why=f"{reason}: {detail}", seconds=_retry_after(response.headers.get("Retry-After")))
        return Reply(why=f"request refused: {detail}", down=status not in OF_THE_REQUEST)

    def _text(self, content: bytes) -> Reply:
        try:
            found = json.loads(content)
        except (ValueError, RecursionError):
            return Reply(why="not a chat completion: the body is not JSON")
        choices = found.get("choices") if isinstance(found, dict) else None
        if not isinstance(choices, list):
            return Reply(why=f"not a chat completion: {self.clean(_message(content)) or 'there are no choices'}")
        if not choices:
            return Reply(why="empty reply: no choices")
        choice = choices[0] if isinstance(choices[0], dict) else {}
        message = choice.get("message")
        text = message.get("content") if isinstance(message, dict) else None
        ended = choice.get("finish_reason")
        if self.any_end and (isinstance(text, str) or ended == "content_filter"):
            return Reply(text=text or "", ended=str(ended))
        if ended == "content_filter":
            return Reply(why="content filter: the server withheld the reply")
        if not isinstance(text, str) or not text.strip():
            length = ", cut off at max_tokens before any text" if ended == "length" else ""
            return Reply(why=f"empty reply: no text{length}")
        if ended == "length":
            return Reply(why=f"reply cut off: at max_tokens, {self.clean(text)!r}")
        return Reply(text=text, ended=str(ended))


def _back_off(number: int, patience: Patience) -> float:
    whole = min(patience.base * 2.0 ** (number - 1), patience.longest)
    return whole * random.uniform(0.5, 1)


def _retry_after(value: str | None) -> float | None:
    """Return the seconds that a Retry-After header asks for (RFC 9110, 10.2.3), None where it asks for nothing."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            when = email.utils.parsedate_to_datetime(value)
        except ValueError:
            return None
        if when.tzinfo is None:
            when = when.replace(tzinfo=datetime.timezone.utc)
        seconds = (when - datetime.datetime.now(datetime.timezone.utc)).total_seconds()
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _message(content: bytes) -> str:
    """Return a server's error: OpenAI's ``error.message``, FastAPI's ``detail``, otherwise the body's start."""
    text = content.decode("utf-8", "replace")
    try:
        found: Any = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if not isinstance(found, dict):
        return text
    error = found.get("error", found)
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail") or text
    return error if isinstance(error, str) else json.dumps(error)
