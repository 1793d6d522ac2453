"""Images that hide in text: what a server or a page would make an image of, in words and in free-form values.

What is refused, in every reading of the text (see :mod:`runtimes.gateway.texts.plain_text`):

* data URLs of images, and image files in base64, hexadecimal digits or base85, whatever the upstream is;
* what models and servers read as the place of an image, such as ``<image>``: see :data:`PLACEHOLDERS`;
* images in Markdown, HTML or other markup that are to be fetched from elsewhere, unless ``upstream_kind`` is one of
  :data:`READS_TEXT_AS_TEXT`.

Control tokens of turns (``<|im_start|>``, ``<start_of_turn>``) pass: a client writes every turn of its request anyway,
and no image comes of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

from runtimes.gateway.options import GatewayOptions
from runtimes.gateway.refusal import Refusal, bad_request
from runtimes.gateway.texts.linked_images import has_linked_image
from runtimes.gateway.texts.packed_images import LEAST, has_data_url, has_packed_image, is_image
from runtimes.gateway.texts.plain_text import TooEscapedError, readings
from safevlm.terminal.printable import shortened

__all__ = ["READS_TEXT_AS_TEXT", "check_free", "check_texts"]

READS_TEXT_AS_TEXT = frozenset(("vllm", "llama-server", "openai"))
"""Upstreams that make images of image parts only.

vLLM's chat parser and llama-server's collect images from parts by their type, and take Markdown as words; so does
OpenAI. Text Generation Inference writes every image part as ``![](url)`` into the text and then looks for that pattern
in the whole prompt, so it makes images of Markdown. LiteLLM passes a request on to any of them.
"""
UNNAMED = ", or ask the operator of this server to say what the upstream is (--upstream-kind)"
BRACKETED = re.compile(r"<\|\s?([^|<>\s][^|<>\n]{0,63})\|>")
OF_MEDIA = re.compile(
    r"image|img|im_patch|vision|visual|video|audio|media|patch|pixel|place.?holder|^endoftext1[01]$", re.IGNORECASE
)
PLACEHOLDERS = re.compile(
    r"<(?:image|im_(?:patch|start|end|col|row|low|newline|pad)|img_(?:start|end|pad|patch)|IMG_CONTEXT|IMAGE_TOKEN|"
    r"image_(?:pad|placeholder|soft_token|newline|token|start|end|atom|patch|row|col)|ImageHere|global-img|visual_pad|"
    r"(?:start|end|begin)_of_(?:image|img|video)|(?:begin|end)_image|boi|eoi|boi_token|eoi_token|vision_(?:start|end|pad)|"
    r"video_(?:pad|soft_token|placeholder)|audio_soft_token|fake_token_around_image|image[_-]?\d+|img_\d+|row_\d+_col_\d+)>"
    r"|<__(?:media|image|img|audio|video)[A-Za-z0-9_]*__>|\[(?:IMG|IMG_BREAK|IMG_END|img-\d+)\]"
    r"|<img>[^<>]*</img>|<\|(?:image|audio|video)>|<(?:image|audio|video)\|>|<image>\./</image>|\]<\]image\[>\["
)
"""Strings that tokenizers, chat templates and servers put an image in the place of.

Of the families here: ``<image>`` (LLaVA), ``<start_of_image>``, ``<image_soft_token>``, ``<end_of_image>`` (Gemma 3),
``<|vision_start|><|image_pad|><|vision_end|>`` (Qwen2.5-VL), the last by :data:`BRACKETED`. Of others: vLLM's
``get_placeholder_str`` of each model, llama.cpp's ``<__media__>`` (with letters of chance in llama-server), Pixtral's
``[IMG]``, ``[img-0]`` of Ollama and earlier llama-server, InternVL's, Idefics' and MiniCPM's. Qwen-VL reads an address
between ``<img>`` and ``</img>``; Phi-4 has ``<|endoftext10|>``, Emu3 ``<|visual token 000001|>``, Gemma 4 ``<|image>``.
"""
FREE_BYTES, FREE_NODES, FREE_DEPTH = 2**20, 10_000, 32
"""Of a free-form value: bytes of its keys and texts, values, levels."""
TEXT_MAX = 10 * 2**20
"""Characters of texts that stand beside each other, as OpenAI has it for one; looking through them takes a second."""
Steps: TypeAlias = "tuple[Steps, str | int] | tuple[()]"
PLAIN = re.compile(rf"[^<\[\]:&%\\]{{0,{LEAST - 1}}}")


def check_texts(texts: Sequence[str], where: str, options: GatewayOptions) -> None:
    """Raise Refusal, 400, where texts that stand beside each other, joined in any way, hold an image."""
    _check(_joined(texts), where, options)


def check_free(value: Any, where: str, options: GatewayOptions) -> None:
    """Raise Refusal, 400, where a free-form value (a schema, arguments) is too large or holds an image.

    Its texts are also read one after the other, an object's keys before its values, as a template may write them.
    ``param`` is the place of the one that holds an image by itself, otherwise ``where``.
    """
    texts: dict[Steps, list[str]] = {}
    for steps, each in _walked(value, where):
        if isinstance(each, str):
            texts.setdefault(steps, []).append(each)
        elif _are_bytes(each):
            raise _holds("an image, byte by byte", _place(where, steps))
    try:
        _check(_joined([text for group in texts.values() for text in group]), where, options)
    except Refusal:
        for steps, group in texts.items():
            _check(group, _place(where, steps), options)
        raise


def _place(where: str, steps: Steps) -> str:
    shown = ""
    while steps:
        steps, step = steps
        shown = (f"[{step}]" if isinstance(step, int) else f".{shortened(step, 40)}") + shown
    return where + shown


def _joined(texts: Sequence[str]) -> Iterable[str]:
    """White space makes no difference to what is looked for; whether there is any does."""
    return dict.fromkeys(("\n".join(texts), "".join(texts))) if len(texts) > 1 else texts


def _check(texts: Iterable[str], where: str, options: GatewayOptions) -> None:
    for text in texts:
        if len(text) > TEXT_MAX:
            raise bad_request(
                f"{where}: the text is too long. At most {TEXT_MAX} characters are allowed.",
                code="string_above_max_length",
                param=where,
            )
        if text.isascii() and PLAIN.fullmatch(text):
            continue
        try:
            for reading in readings(text):
                _check_reading(reading, where, options)
        except TooEscapedError as error:
            raise bad_request(
                f"{where}: the text {error}, so it cannot be searched for images.",
                code="image_in_text",
                param=where,
            ) from None


def _check_reading(text: str, where: str, options: GatewayOptions) -> None:
    if ":" in text and has_data_url(text):
        raise _holds("a data URL of an image", where)
    placeholder = next(_placeholders(text), None)
    if placeholder is not None:
        raise bad_request(
            f"{where}: the text holds '{placeholder}', which models replace with an image. Leave it out; images are "
            "placed by their own parts.",
            code="image_placeholder",
            param=where,
        )
    if has_packed_image(text):
        raise _holds("an encoded image", where)
    if options.upstream_kind not in READS_TEXT_AS_TEXT and has_linked_image(text):
        raise bad_request(
            f"{where}: the text links to an image (Markdown, HTML), which some servers fetch. Send it as an image_url "
            f"part, or leave its address out{UNNAMED if options.upstream_kind == 'unknown' else ''}.",
            code="image_in_text",
            param=where,
        )


def _placeholders(text: str) -> Iterator[str]:
    found = PLACEHOLDERS.search(text)
    if found is not None:
        yield "".join(found[0].split())
    for each in BRACKETED.finditer(text):
        if OF_MEDIA.search(each[1]):
            yield each[0]


def _holds(what: str, where: str) -> Refusal:
    return bad_request(
        f"{where}: the text holds {what}. Send images as image_url parts.", code="image_in_text", param=where
    )


def _walked(value: Any, where: str) -> Iterator[tuple[Steps, Any]]:
    """Yield the keys, texts and lists of a value in order, with their places. Raises Refusal for one too large."""
    left: list[tuple[Any, Steps, int]] = [(value, (), 0)]
    nodes = size = 0
    while left:
        each, steps, depth = left.pop()
        nodes += 1
        if isinstance(each, dict):
            for key, part in reversed(each.items()):
                left += [(part, (steps, key), depth + 1), (key, steps, depth)]
        elif isinstance(each, list):
            yield steps, each
            left += [(each[at], (steps, at), depth + 1) for at in range(len(each) - 1, -1, -1)]
        elif isinstance(each, str):
            size += len(each) if each.isascii() else len(each.encode("utf-8", "surrogatepass"))
            yield steps, each
        if nodes + len(left) > FREE_NODES or depth > FREE_DEPTH or size > FREE_BYTES:
            raise bad_request(
                f"{where} is too large: {FREE_NODES} keys and values, {FREE_DEPTH} levels and {FREE_BYTES} bytes are "
                "allowed.",
                code="value_too_large",
                param=where,
            )


def _are_bytes(values: list[Any]) -> bool:
    """Say whether a list is an image file as numbers, as ``JSON.stringify`` writes a buffer."""
    begin = values[:64]
    if len(begin) < LEAST or not all(type(each) is int and 0 <= each < 256 for each in begin):
        return False
    return is_image(bytes(begin))
