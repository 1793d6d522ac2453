"""Images that hide in text: what a server or a page would make an image of, in words and in free-form values."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from runtimes.gateway.options import GatewayOptions
from runtimes.gateway.refusal import bad_request

__all__ = ["check_free", "check_texts"]

DATA_URL = re.compile(r"data:image/", re.IGNORECASE)


def check_texts(texts: Sequence[str], where: str, options: GatewayOptions) -> None:
    """Raise Refusal, 400, where the texts of one message, alone or joined in order, hold an image."""
    if DATA_URL.search("".join(texts)):
        raise bad_request(f"{where}: an image stands in the text; send it as an image part.", param=where)


def check_free(value: Any, where: str, options: GatewayOptions) -> None:
    """Raise Refusal, 400, where a free-form JSON value (a schema, metadata, arguments) is too large or holds an image."""
    if isinstance(value, str):
        check_texts([value], where, options)
