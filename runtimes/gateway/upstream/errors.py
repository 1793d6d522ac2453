"""What an upstream says of an error, in its own shape, as one of OpenAI's shape.

OpenAI's ``{"error": {…}}``, vLLM's flat ``{"object": "error", "message": …}``, FastAPI's ``{"detail": …}``, TGI's and
Ollama's ``{"error": "…"}``, plain text and HTML.
"""

from __future__ import annotations

import html
import re
from http import HTTPStatus
from typing import Any

from runtimes.gateway.answers import strict_json
from runtimes.gateway.serving.json_bounds import check_json

__all__ = ["MAX_ERROR", "stated_error", "upstream_words"]

MAX_WORDS, MAX_RAW = 4000, 300
"""Characters of an upstream's message, and of a body that is none."""
MAX_ERROR = 256 * 1024
"""Bytes of an error that are looked at."""
KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    409: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
}
HIDDEN = "[key]"
_DROPPED = re.compile(r"<!--.*?-->|<(script|style|head)\b.*?</\1\s*>|<[^<>]{0,1000}>", re.DOTALL | re.IGNORECASE)
_TITLE = re.compile(r"<title[^<>]{0,100}>([^<]{1,500})", re.IGNORECASE)
_SPACE = re.compile(r"[\s\x00-\x1f\x7f]+")


def upstream_words(status: int, content: bytes, hidden: bytes | None = None) -> dict[str, Any]:
    """Return OpenAI's error object for an upstream's answer of status 400 to 599; ``hidden`` is not quoted."""
    body = _read(content)
    if isinstance(body, list) and body:  # Google's server
        body = body[0]
    found = stated_error(body, status, hidden) if isinstance(body, dict) else None
    if found is None:
        words = _raw(content.decode("utf-8", "replace")[: 20 * MAX_RAW])
        said = f"the upstream answered with HTTP {status}"
        found = _error(f"{said}: {words}" if words else f"{said}.", {}, status, hidden)
    return found


def stated_error(body: dict[str, Any], status: int, hidden: bytes | None = None) -> dict[str, Any] | None:
    """Return the error that a JSON object states, in OpenAI's shape; None where it states none.

    Of a stream's events, whose ``status`` is 200, only those count that say of themselves that they are an error.
    """
    error = body.get("error")
    if isinstance(error, dict):
        return _error(_words(error.get("message")) or _words(error) or "", error, status, hidden)
    if isinstance(error, str) and error:
        return _error(error, {"type": body.get("error_type"), **body}, status, hidden)
    if body.get("object") == "error" or (status >= HTTPStatus.BAD_REQUEST and isinstance(body.get("message"), str)):
        return _error(_words(body.get("message")) or "", body, status, hidden)
    detail = body.get("detail")
    if status < HTTPStatus.BAD_REQUEST or not detail:
        return None
    if isinstance(detail, dict) and ("error" in detail or "message" in detail):
        return stated_error(detail, status, hidden)
    return _error(_words(detail) or "", {}, status, hidden)


def _error(message: str, stated: dict[str, Any], status: int, hidden: bytes | None) -> dict[str, Any]:
    kind, param, code = stated.get("type"), stated.get("param"), stated.get("code")
    error = {
        "message": _told(message or f"the upstream answered with HTTP {status} and no message", MAX_WORDS, hidden),
        "type": _told(kind, 100, hidden) if isinstance(kind, str) and kind else KINDS.get(status, "upstream_error"),
        "param": _told(param, 200, hidden) if isinstance(param, str) else None,
        "code": _told(str(code), 100, hidden) if isinstance(code, str | int) and code != status else None,
    }
    return {"error": error}


def _words(value: Any) -> str | None:
    """Return what a text, FastAPI's list of findings, or any other JSON value says."""
    if isinstance(value, str) or value is None:
        return value
    if isinstance(value, dict) and isinstance(value.get("msg"), str):
        place = value.get("loc")
        where = ".".join(map(str, place)) if isinstance(place, list) else ""
        return f"{where}: {value['msg']}" if where else value["msg"]
    if isinstance(value, list):
        return "; ".join(filter(None, map(_words, value[:20])))
    return str(value)[:MAX_WORDS]


def _raw(text: str) -> str:
    """Return the words of plain text, or those of a page without its markup."""
    title = _TITLE.search(text)
    return _short(html.unescape(title.group(1) if title else _DROPPED.sub(" ", text)), MAX_RAW)


def _told(text: str, limit: int, hidden: bytes | None) -> str:
    key = (hidden or b"").decode("latin-1")
    return _short(text.replace(key, HIDDEN) if key else text, limit)


def _short(text: str, limit: int) -> str:
    text = _SPACE.sub(" ", text[: 4 * limit]).strip()
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _read(content: bytes) -> Any:
    try:
        check_json(content, nodes=10_000, depth=50)
        return strict_json(content)
    except (ValueError, RecursionError):
        return None
