"""A chat request taken apart: which images are in it, and the same request with what was judged in their place.

Whatever could carry an image past the guard is refused: content parts of other types, unknown keys of messages,
top-level keys that some servers read media from.
"""

from __future__ import annotations

import base64
import binascii
import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from runtimes.gateway.options import GatewayOptions
from runtimes.gateway.refusal import bad_request

__all__ = ["ChatRequest", "ImageReference", "parse_chat", "parse_guard"]

PLAIN_PARTS = ("text", "refusal")
MESSAGE_KEYS = frozenset(
    (
        "role",
        "content",
        "name",
        "tool_calls",
        "tool_call_id",
        "refusal",
        "function_call",
        "reasoning_content",
        "reasoning",
    )
)
MEDIA_KEY = re.compile(r"image|video|audio|media|multi_?modal|document|file|prompt_embeds", re.IGNORECASE)
DATA_URL = re.compile(r"data:([a-z0-9.+-]+/[a-z0-9.+-]+)?(?:;[a-z0-9=-]+)*;base64,", re.IGNORECASE)
SHOWN = 80


@dataclass(frozen=True, kw_only=True)
class ImageReference:
    """An image of a request: its bytes, or the URL that it is to be fetched from; ``where`` is its place."""

    where: str
    content: bytes | None = None
    url: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class ChatRequest:
    """A request as it came, and its images in order of appearance."""

    body: dict[str, Any]
    images: tuple[ImageReference, ...]
    places: tuple[tuple[int, int], ...] = field(default=())
    """Message and part of each image."""

    @property
    def stream(self) -> bool:
        """Whether the answer is to come in pieces."""
        return self.body.get("stream") is True

    @property
    def model(self) -> str:
        """The model that is asked for."""
        return str(self.body.get("model", ""))[:SHOWN]

    def with_images(self, urls: Sequence[str]) -> dict[str, Any]:
        """Return the body with the images replaced, in order."""
        body = copy.deepcopy(self.body)
        for (message, part), url in zip(self.places, urls, strict=True):
            old = self.body["messages"][message]["content"][part]["image_url"]
            kept = {key: value for key, value in old.items() if key == "detail"} if isinstance(old, dict) else {}
            body["messages"][message]["content"][part] = {"type": "image_url", "image_url": {"url": url, **kept}}
        return body


def parse_chat(body: Any, options: GatewayOptions) -> ChatRequest:
    """Check a request and find its images. Errors: Refusal, 400."""
    if not isinstance(body, dict):
        raise bad_request("the body must be a JSON object.")
    for key in body:
        if MEDIA_KEY.search(key):
            raise bad_request(f"the key {key[:SHOWN]!r} is not taken: media goes into messages.", param=key[:SHOWN])
    if body.get("modalities", ["text"]) != ["text"]:
        raise bad_request("only text can be answered.", param="modalities")
    if not isinstance(body.get("stream"), bool | None):
        raise bad_request("'stream' must be true or false.", param="stream")
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise bad_request("'messages' must be a list of at least one message.", param="messages")
    images: list[ImageReference] = []
    places: list[tuple[int, int]] = []
    for number, message in enumerate(messages):
        for part, reference in _images(number, message, options):
            images.append(reference)
            places.append((number, part))
            _check_count(len(images), options)
    if options.require_image and not images:
        raise bad_request("this server takes requests with an image only.", param="messages")
    return ChatRequest(body=body, images=tuple(images), places=tuple(places))


def parse_guard(body: Any, options: GatewayOptions) -> tuple[ImageReference, ...]:
    """Check a request of /v1/guard, ``{"images": [url, …]}``. Errors: Refusal, 400."""
    urls = body.get("images") if isinstance(body, dict) else None
    if not isinstance(urls, list) or not urls or set(body) - {"images"}:
        raise bad_request("the body must be an object with 'images', a list of at least one URL.", param="images")
    _check_count(len(urls), options)
    return tuple(_reference(url, f"images[{number}]", options) for number, url in enumerate(urls))


def _check_count(count: int, options: GatewayOptions) -> None:
    if count > options.max_images:
        raise bad_request(
            f"more than {options.max_images} images in one request; that many are allowed.", code="too_many_images"
        )


def _images(number: int, message: Any, options: GatewayOptions) -> list[tuple[int, ImageReference]]:
    where = f"messages[{number}]"
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise bad_request(f"{where} must be an object with a role.", param=where)
    unknown = set(message) - MESSAGE_KEYS
    if unknown:
        raise bad_request(f"{where} has the key {sorted(unknown)[0][:SHOWN]!r}, which is not taken.", param=where)
    content = message.get("content")
    if content is None or isinstance(content, str):
        return []
    if not isinstance(content, list):
        raise bad_request(f"{where}.content must be text or a list of parts.", param=where)
    found = []
    for place, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "image_url":
            found.append((place, _reference(part.get("image_url"), f"{where}.content[{place}]", options)))
        elif kind not in PLAIN_PARTS or not isinstance(part.get(kind), str) or set(part) - {"type", kind}:
            raise bad_request(
                f"{where}.content[{place}] is of type {str(kind)[:SHOWN]!r}: 'text' and 'image_url' are judged and "
                "passed on, nothing else is.",
                code="unsupported_content",
                param=where,
            )
    return found


def _reference(given: Any, where: str, options: GatewayOptions) -> ImageReference:
    url = given.get("url") if isinstance(given, dict) else given
    if not isinstance(url, str) or not url:
        raise bad_request(f"{where}: an image is a URL.", param=where)
    if url[:5].lower() != "data:":
        return ImageReference(where=where, url=url)
    head = DATA_URL.match(url[:256])
    if head is None:
        raise bad_request(f"{where}: a data URL of an image begins with data:image/…;base64, .", param=where)
    kind = head.group(1)
    if kind is not None and not kind.lower().startswith("image/"):
        raise bad_request(f"{where}: the data URL says it is {kind[:SHOWN]}, not an image.", param=where)
    if (len(url) - head.end()) * 3 // 4 > options.max_image_bytes:
        raise bad_request(
            f"{where}: the image has more than {options.max_image_bytes} bytes.", code="image_too_large", status=413
        )
    try:
        content = base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise bad_request(f"{where}: its base64 is damaged.", code="invalid_image", param=where) from None
    return ImageReference(where=where, content=content)
