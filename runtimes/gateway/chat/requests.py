"""A chat request taken apart: which images are in it, and what goes upstream with the judged ones in their place.

The body is parsed into :mod:`runtimes.gateway.chat.types`, and the upstream's body is written from those types and the
keys that the operator named. Nothing of the client's body is passed on beside it, so what could carry an image past the
guard has no way. Values that are free (schemas, metadata, arguments) and all text are looked through for images.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from runtimes.gateway.chat.misfits import misfit, unknown
from runtimes.gateway.chat.typed import is_empty
from runtimes.gateway.chat.types import Chat
from runtimes.gateway.images.image_urls import ImageReference, image_reference
from runtimes.gateway.options import GatewayOptions
from runtimes.gateway.refusal import bad_request
from runtimes.gateway.texts.text_images import check_free, check_texts
from safevlm.files.json_file import parse_json
from safevlm.terminal.printable import shortened

__all__ = ["ChatRequest", "ImageReference", "parse_chat", "parse_guard"]

SHOWN = 80
DOES_NOTHING: dict[str, Any] = {"max_tokens": -1, "modalities": ["text"], "response_format": {"type": "text"}}
"""Values that ask for the default behaviour; their keys are dropped like null and empty ones."""
ASKING = ("developer", "system", "user")
ESCAPED = re.compile(r"\\(?:u([0-9a-fA-F]{4})|(.))", re.DOTALL)


@dataclass(frozen=True, kw_only=True, eq=False)
class ChatRequest:
    """A request in types, without its images' URLs, and its images in order of appearance."""

    chat: Chat
    images: tuple[ImageReference, ...]
    passed: dict[str, Any] = field(default_factory=dict)
    """The keys beyond OpenAI's that the operator allows."""

    @property
    def stream(self) -> bool:
        """Whether the answer is to come in pieces."""
        return self.chat.stream is True

    @property
    def model(self) -> str:
        """The model that is asked for."""
        return (self.chat.model or "")[:SHOWN]

    def upstream_body(self, urls: Sequence[str]) -> dict[str, Any]:
        """Return the upstream's body, with ``urls`` as its images, in order; there must be as many."""
        assert len(urls) == len(self.images), "each image has been judged"
        return {**self.chat.written(iter(urls)), **self.passed}

    @property
    def plain(self) -> dict[str, Any]:
        """The request as a body without its images."""
        return self.upstream_body([""] * len(self.images))


def parse_chat(body: Any, options: GatewayOptions) -> ChatRequest:
    """Check a request and find its images. Raises Refusal, 400."""
    if not isinstance(body, dict):
        raise bad_request("the body must be a JSON object.")
    known, passed = _sorted_keys(body, options)
    if not isinstance(known.get("messages"), list) or not known["messages"]:
        raise bad_request("'messages' must be a list of at least one message.", param="messages")
    try:
        chat = Chat.model_validate(known)
    except ValidationError as error:
        raise misfit(error) from None
    images = tuple(_images(chat, options))
    if options.require_image and not images:
        raise bad_request("this server accepts only requests with an image.", param="messages")
    _check_what_is_written({**chat.written(itertools.repeat("")), **passed}, options)
    return ChatRequest(chat=chat, images=images, passed=passed)


def parse_guard(body: Any, options: GatewayOptions) -> tuple[ImageReference, ...]:
    """Check a request of /v1/guard, ``{"images": [url, …]}``. Raises Refusal, 400."""
    urls = body.get("images") if isinstance(body, dict) else None
    if not isinstance(urls, list) or not urls or set(body) - {"images"}:
        raise bad_request("the body must be an object with 'images', a list of at least one URL.", param="images")
    _check_count(len(urls), options)
    return tuple(image_reference(_url_of(url), f"images[{number}]", options) for number, url in enumerate(urls))


def _url_of(given: Any) -> Any:
    return given.get("url") if isinstance(given, dict) else given


def _sorted_keys(body: dict[str, Any], options: GatewayOptions) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the typed keys that say something, and those that the operator allows. Raises Refusal for others."""
    known: dict[str, Any] = {}
    passed: dict[str, Any] = {}
    for key, value in body.items():
        if key in Chat.model_fields:
            if not is_empty(value) and DOES_NOTHING.get(key) != value:
                known[key] = value
        elif key in options.pass_keys:
            if not is_empty(value):
                passed[key] = value
        elif key == "audio" and not is_empty(value):
            raise bad_request("answers can only be text.", param="audio")
        elif value is not None and (key not in Chat.EMPTY or not is_empty(value)):
            raise unknown(key)
    if "modalities" in known:
        raise bad_request("answers can only be text: 'modalities' must be ['text'].", param="modalities")
    return known, passed


def _check_count(count: int, options: GatewayOptions) -> None:
    if count > options.max_images:
        raise bad_request(
            f"the request has more than {options.max_images} images, the maximum.",
            code="too_many_images",
            param="messages",
        )


def _images(chat: Chat, options: GatewayOptions) -> Iterator[ImageReference]:
    """Yield the images, and take their URLs out of the request."""
    parts = [
        (f"messages[{number}].content[{place}].image_url", part)
        for number, message in enumerate(chat.messages)
        for place, part in message.images()
    ]
    _check_count(len(parts), options)
    for where, part in parts:
        yield image_reference(part.url, where if isinstance(part.image_url, str) else f"{where}.url", options)
        part.forget()


# -- what is looked through -----------------------------------------------------------------------------


def _check_what_is_written(body: dict[str, Any], options: GatewayOptions) -> None:
    """Look through all that goes upstream beside the images. Raises Refusal, 400, with the place."""
    turns: list[tuple[bool, str, list[str]]] = []
    for number, message in enumerate(body["messages"]):
        where = f"messages[{number}]"
        for key, value in message.items():
            if key != "content":
                _check(value, f"{where}.{key}", options)
        texts = _check_content(message["content"], f"{where}.content", options)
        turns.append((message["role"] in ASKING, where, texts))
    for _, turn in itertools.groupby(turns, key=lambda each: each[0]):  # some templates make one turn of them
        _, places, texts_of_each = zip(*turn, strict=True)
        if len(places) > 1:
            check_texts(list(itertools.chain.from_iterable(texts_of_each)), places[0], options)
    for key, value in body.items():
        if key == "prediction":
            _check_content(value["content"], "prediction.content", options)
        elif key != "messages":
            _check(value, shortened(key), options)


def _check_content(content: str | list[dict[str, Any]] | None, where: str, options: GatewayOptions) -> list[str]:
    """Return the texts, looked through."""
    parts = content if isinstance(content, list) else [] if content is None else [{"text": content}]
    texts = [part[key] for part in parts for key in ("text", "refusal") if key in part]
    for text in texts:
        _check_whole(text, where)
    check_texts(texts, where, options)
    return texts


def _check(value: Any, where: str, options: GatewayOptions) -> None:
    check_free(value, where, options)
    _check_whole(value, where)
    if where.endswith((".tool_calls", ".function_call")):
        for place, text in _strings(value, where):
            _check_arguments(text, place, options)
    if where.endswith((".reasoning_details", ".thinking_blocks")):
        for key in ("text", "summary", "thinking", "data"):
            check_texts([block[key] for block in value if key in block], where, options)


def _check_whole(value: Any, where: str) -> None:
    """Refuse half of a surrogate pair: it has no UTF-8, and servers differ in what they make of it."""
    try:
        (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).encode()
    except UnicodeEncodeError:
        raise bad_request(
            f"{where} holds an unpaired surrogate. Send whole characters.", code="invalid_value", param=where
        ) from None


def _strings(value: Any, where: str) -> Iterator[tuple[str, str]]:
    """Yield each string of a typed value with its place."""
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from _strings(each, f"{where}.{key}")
    elif isinstance(value, list):
        for number, each in enumerate(value):
            yield from _strings(each, f"{where}[{number}]")


def _check_arguments(text: str, where: str, options: GatewayOptions) -> None:
    """Look into arguments as a server does that parses them before it fills in its chat template."""
    if "\\" in text:
        check_texts([ESCAPED.sub(_unescaped, text)], where, options)
    if text.lstrip()[:1] not in ("{", "["):
        return
    try:
        json.loads(text)
    except ValueError:
        return  # no JSON: models do write such arguments, and they are read as the text that they are
    except RecursionError:
        raise bad_request(f"{where} is nested too deeply.", param=where) from None
    try:
        parsed = parse_json(text)
    except ValueError as error:
        raise bad_request(f"{where} must be unambiguous JSON: {error}.", param=where) from None
    check_free(parsed, where, options)


def _unescaped(found: re.Match[str]) -> str:
    return chr(int(found.group(1), 16)) if found.group(1) else found.group(2)
