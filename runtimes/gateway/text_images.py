"""Images that hide in text: what a server or a page would make an image of, in words and in free-form values."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from runtimes.gateway.options import GatewayOptions
from runtimes.gateway.refusal import bad_request

__all__ = ["check_free", "check_texts"]

DATA_URL = re.compile(r"data:image/", re.IGNORECASE)
SPACE = re.compile(r"\s+")
MAX_NODES, MAX_DEPTH = 10_000, 32
"""Of a free-form value."""


def check_texts(texts: Sequence[str], where: str, options: GatewayOptions) -> None:  # noqa: ARG001
    """Raise Refusal, 400, where the texts of one message, alone or joined in order, hold an image's data URL."""
    if DATA_URL.search(SPACE.sub("", "".join(texts))):
        raise bad_request(
            f"{where}: an image stands in the text; send it as an image part.", code="image_in_text", param=where
        )


def check_free(value: Any, where: str, options: GatewayOptions) -> None:
    """Raise Refusal, 400, where a free-form value (a schema, arguments) is too large or holds an image."""
    left, nodes = [(value, 0)], 0
    while left:
        each, depth = left.pop()
        nodes += 1
        if nodes > MAX_NODES or depth > MAX_DEPTH:
            raise bad_request(
                f"{where} is too large: {MAX_NODES} values, {MAX_DEPTH} deep, are allowed.",
                code="value_too_large",
                param=where,
            )
        if isinstance(each, str):
            check_texts([each], where, options)
        elif isinstance(each, dict):
            check_texts(list(each), where, options)
            left += [(inner, depth + 1) for inner in each.values()]
        elif isinstance(each, list):
            left += [(inner, depth + 1) for inner in each]
