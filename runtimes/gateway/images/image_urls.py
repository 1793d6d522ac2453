"""An image of a request: its bytes, out of a data URL as clients write them, or the URL it is to be fetched from.

Data URLs are read as browsers do (WHATWG's fetch standard): parameters, white space, percent signs, base64 of either
alphabet with or without its padding. What is read here is what is judged and sent on, so leniency costs no safety.
"""

from __future__ import annotations

import base64
import binascii
import re
import urllib.parse
from dataclasses import dataclass
from typing import Any

from runtimes.gateway.options import GatewayOptions
from runtimes.gateway.refusal import Refusal, bad_request
from safevlm.terminal.printable import shortened

__all__ = ["ImageReference", "image_reference"]

HEAD = re.compile(r"data:([^,;]*)((?:;[^,;]*)*);\s*base64\s*,", re.IGNORECASE)
HEAD_MAX, URL_MAX = 1024, 8192
BLANKS = b" \t\r\n\f\v"
STANDARD = bytes.maketrans(b"-_", b"+/")
UNTYPED = ("", "application/octet-stream")


@dataclass(frozen=True, kw_only=True)
class ImageReference:
    """An image of a request: its bytes, or the URL that it is to be fetched from; ``where`` is its place."""

    where: str
    content: bytes | None = None
    url: str | None = None


def image_reference(given: Any, where: str, options: GatewayOptions) -> ImageReference:
    """Return the image behind a URL. Raises Refusal where it is malformed, no image or too large."""
    url = given.strip() if isinstance(given, str) else ""
    if not url:
        raise bad_request(f"{where}: an image must be given as a URL.", param=where)
    if url[:5].lower() == "data:":
        return ImageReference(where=where, content=_content(url, where, options))
    if len(url) > URL_MAX:
        raise bad_request(f"{where}: a URL may have at most {URL_MAX} characters.", param=where)
    return ImageReference(where=where, url=url)


def _content(url: str, where: str, options: GatewayOptions) -> bytes:
    head = HEAD.match(url[:HEAD_MAX])
    if head is None:
        raise bad_request(f"{where}: the data URL of an image must begin with data:image/…;base64, .", param=where)
    kind = head.group(1).strip().lower()
    if not kind.startswith("image/") and kind not in UNTYPED:
        raise bad_request(f"{where}: the data URL says it is {shortened(kind)}, not an image.", param=where)
    damaged = bad_request(f"{where}: the data URL is not valid base64.", code="invalid_image", param=where)
    try:
        packed = url[head.end() :].encode("ascii")
    except UnicodeEncodeError:
        raise damaged from None
    if b"%" in packed:
        packed = urllib.parse.unquote_to_bytes(packed)
    packed = packed.translate(STANDARD, BLANKS).rstrip(b"=")
    if len(packed) * 3 // 4 > options.max_image_bytes:
        raise _too_large(where, options)
    try:
        return base64.b64decode(packed + b"=" * (-len(packed) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise damaged from None


def _too_large(where: str, options: GatewayOptions) -> Refusal:
    return bad_request(
        f"{where}: the image has more than {options.max_image_bytes} bytes.",
        code="image_too_large",
        param=where,
        status=413,
    )
