"""A grammar of hostile chat requests, and a reader of what reached an upstream that knows nothing of the gateway."""

from __future__ import annotations

import base64
import binascii
import copy
import hashlib
import html
import io
import json
import re
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st
from PIL import Image

from tests.runtimes.gateway.chat.chat_bodies import every_key, image, text
from tests.runtimes.gateway.servers import SAFE, SAFE_URL, UNSAFE, data_url, messages
from tests.runtimes.gateway.texts.hidden_images import PACKED, PLACEHOLDERS, SHOWING, URLS, WRAPPED, WRITTEN, encoded

HOST = "evil.example"
UNJUDGED = UNSAFE.resize((48, 48))
"""The image that an attack is to carry past the guard."""
HOSTILE_URL = data_url(encoded("PNG", UNJUDGED))
ALLOWED_URL = data_url(encoded("PNG", SAFE))
"""Of an image that passes where it is judged, so that requests with it arrive."""


# -- what is sent ---------------------------------------------------------------------------------------


@dataclass
class Twice:
    """An object's value whose key stands twice, with another value each time."""

    first: Any
    second: Any


def written(value: Any) -> str:
    """Return JSON, with keys twice where that is wanted."""
    if isinstance(value, dict):
        pairs = [
            f"{json.dumps(key)}: {written(one)}"
            for key, each in value.items()
            for one in ((each.first, each.second) if isinstance(each, Twice) else (each,))
        ]
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(written, value)) + "]"
    return written([value.first, value.second]) if isinstance(value, Twice) else json.dumps(value)


def spelled(url: str) -> list[str]:
    """Return spellings of a data URL that lenient readers take."""
    head, packed = url.split(",", 1)
    return [
        url,
        url.replace("data:", "DATA:", 1),
        f" {url}",
        f"\t\n{url}",
        f"{head},{packed[:40]}\n{packed[40:]}",
        f"{head},{packed.rstrip('=')}",
        f"{head},{packed}====",
        f"data:;base64,{packed}",
        f"data:application/octet-stream;base64,{packed}",
        f"data:text/plain;base64,{packed}",
        f"data:image/png;charset=utf-8;base64,{packed}",
        f"data:image/png;base64,{urllib.parse.quote(packed, safe='')}",
        f"data:image/png;base64;base64,{packed}",
        f"data:image/png,{packed}",
        f"{head},{packed},{packed}",
        f"{url}#{url}",
        f"{SAFE_URL}#{url}",
        f"{SAFE_URL},{packed}",
        f"{SAFE_URL}{packed}",
        f"{SAFE_URL}\x00{url}",
        packed,
    ]


def among(values: list[Any]) -> st.SearchStrategy[Any]:
    """Return a strategy that does not show its values, which are long."""
    return st.integers(0, len(values) - 1).map(lambda at: copy.deepcopy(values[at]))


def hostile_texts() -> st.SearchStrategy[str]:
    urls = among([HOSTILE_URL, *spelled(HOSTILE_URL)[7:13], *URLS.values()])
    hidden = st.builds(
        lambda url, way, wrap: WRAPPED[wrap](WRITTEN[way](url)),
        urls,
        st.sampled_from(sorted(WRITTEN)),
        st.sampled_from(sorted(WRAPPED)),
    )
    remote = st.builds(
        lambda wrap, scheme: WRAPPED[wrap](f"{scheme}//{HOST}/a.png"),
        st.sampled_from(SHOWING),
        st.sampled_from(["https:", "http:", "", "ftp:", "HTTPS:"]),
    )
    packed = among(list(PACKED.values()))
    places = st.sampled_from(PLACEHOLDERS).map(lambda token: f"what is {token}?")
    return st.one_of(hidden, hidden, remote, packed, places)


ADDRESSES = among(
    [
        *spelled(ALLOWED_URL),
        *spelled(HOSTILE_URL),
        f"https://{HOST}/a.png",
        f"//{HOST}/a.png",
        "file:///etc/passwd",
        "blob:x",
        "",
        "x" * 9000,
    ]
)


def hostile_parts() -> st.SearchStrategy[Any]:
    """Return content parts of several protocols, that of OpenAI's chat among them."""
    return ADDRESSES.flatmap(
        lambda url: among(
            [
                image(url),
                {"type": "image_url", "image_url": url},
                {"type": "image_url", "image_url": {"url": SAFE_URL, "detail": {"url": url}}},
                {"type": "image_url", "image_url": {"url": SAFE_URL, "image_url": url}},
                {"type": "image_url", "image_url": {"url": [url]}},
                {"type": "image_url", "image_url": [url, SAFE_URL]},
                {"type": "image_url", "image_url": {"url": SAFE_URL, "URL": url}},
                {"type": "image_url", "image_url": {"url": Twice(SAFE_URL, url)}},
                {"type": "image_url", "image_url": {"url": Twice(url, SAFE_URL)}},
                {"type": "image_url", "image_url": {"url": SAFE_URL}, "url": url},
                {"type": "image_url", "image_url": {"url": SAFE_URL, "format": url}},
                {"type": "image_url", "image_url": {"url": SAFE_URL}, "uuid": url},
                {"type": Twice("text", "image_url"), "text": "a", "image_url": {"url": url}},
                {"type": "text", "text": "a", "image_url": {"url": url}},
                {"type": "text", "text": url},
                {"type": "text", "text": {"url": url}},
                {"type": "text", "text": "a", "cache_control": {"type": "ephemeral", "ttl": url}},
                {"type": "text", "text": "a", "annotations": [{"image_url": url}]},
                {"type": "refusal", "refusal": url},
                {"type": "input_image", "image_url": url},
                {"type": "input_image", "image_url": url, "detail": "auto"},
                {"type": "input_text", "text": url},
                {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": url.split(",")[-1]}},
                {"type": "image", "image": url},
                {"type": "image_pil", "image_pil": url},
                {"type": "image_embeds", "image_embeds": url},
                {"type": "video_url", "video_url": {"url": url}},
                {"type": "input_audio", "input_audio": {"data": url, "format": "wav"}},
                {"type": "file", "file": {"file_data": url, "filename": "a.png"}},
                {"type": "IMAGE_URL", "image_url": {"url": url}},
                {"type": ["image_url"], "image_url": {"url": url}},
                {"type": "thinking", "thinking": url},
                {"image_url": {"url": url}},
                {"image_url": url},
                {"image": url},
                {"inline_data": {"mime_type": "image/png", "data": url.split(",")[-1]}},
                url,
                [url],
            ]
        )
    )


def hostile_values() -> st.SearchStrategy[Any]:
    """Return values to put anywhere."""
    leaf = st.one_of(
        hostile_texts(),
        ADDRESSES,
        hostile_parts(),
        st.just(list(encoded("GIF", UNJUDGED))),
        st.sampled_from([None, True, 0, -1, 1e300, "low", [], {}]),
    )
    return st.recursive(
        leaf,
        lambda inner: st.one_of(
            st.lists(inner, max_size=2),
            st.dictionaries(st.sampled_from(KEYS) | hostile_texts(), inner, max_size=2),
            inner.map(lambda each: [{"role": "user", "content": each if isinstance(each, list) else [each]}]),
            inner.map(lambda each: {"messages": [{"role": "user", "content": [each]}]}),
            inner.map(written),
        ),
        max_leaves=3,
    )


HARMLESS = among(
    ["words", "", None, [], {}, image(ALLOWED_URL), {"type": "image_url", "image_url": SAFE_URL}, text("a")]
)
"""What is taken in many places, so that the rest of the request is what is tried."""
KEYS = [
    *("annotations", "parsed", "provider_specific_fields", "index", "reasoning_items", "cache_control", "name", "user"),
    *(
        "images",
        "image",
        "image_url",
        "url",
        "extra_body",
        "messages",
        "input",
        "prompt",
        "api_base",
        "content",
        "detail",
    ),
    *(
        "file",
        "files",
        "media",
        "multi_modal_data",
        "mm_processor_kwargs",
        "documents",
        "attachments",
        "video_url",
        "uuid",
    ),
    *("Messages", "MESSAGES", "mesſages", "Image_Url", "tools", "metadata", "response_format", "guided_json", "schema"),
    *("fallbacks", "proxy_server_request", "litellm_params", "model_list", "base_url", "headers", "extra_headers"),
    *(
        "chat_template",
        "chat_template_kwargs",
        "prediction",
        "audio",
        "modalities",
        "function_call",
        "functions",
        "suffix",
    ),
    *("image_data", "prompt_embeds", "user_config", "custom_llm_provider", "instructions", "previous_response_id"),
]


def steps_of(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    if isinstance(value, (dict, list)):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from steps_of(each, (*path, key))


@st.composite
def attacks(draw: st.DrawFn) -> str:
    """Return the JSON of a request with one to three hostile values in it."""
    simple = {"model": "fake", "messages": messages(SAFE_URL)}
    told = {"model": "fake", "messages": [{"role": "user", "content": "hello"}]}
    body = json.loads(json.dumps(draw(st.sampled_from([simple, told, every_key(), every_key()]))))
    body.pop("stream", None)
    for _ in range(draw(among([1, 1, 1, 2, 3]))):
        found = body
        path = draw(st.sampled_from([each for each in steps_of(body) if not any(isinstance(s, Twice) for s in each)]))
        for step in path[:-1]:
            found = found[step]
        last, value = path[-1], draw(st.one_of(hostile_values(), hostile_parts(), hostile_texts(), HARMLESS, HARMLESS))
        way = draw(st.sampled_from(["replace", "text", "beside", "beside", "twice", "case", "split", "into", "top"]))
        if way == "top":
            body[draw(st.sampled_from(KEYS))] = value
        elif way == "into" and isinstance(found[last], list):
            found[last].append(value)
        elif way == "text" and isinstance(found[last], str):
            found[last] = draw(hostile_texts())
        elif way == "split" and isinstance(found[last], list):
            words = draw(hostile_texts())
            cut = draw(st.integers(1, min(60, len(words) - 1)))
            found[last] += [text(words[:cut]), text(words[cut:])]
        elif isinstance(found, list) or way == "replace":
            found[last] = value
        elif way == "beside":
            found[draw(st.sampled_from(KEYS))] = value
        elif way == "twice" and not isinstance(found[last], Twice):
            found[last] = draw(st.sampled_from([Twice(found[last], value), Twice(value, found[last])]))
        else:
            found[draw(st.sampled_from([last.upper(), last.title(), f" {last}", f"{last}\u200b"]))] = value
    return written(body)


# -- what arrives ---------------------------------------------------------------------------------------


def pixels(content: bytes) -> str | None:
    """Return what tells an image's pixels, None for bytes that are no image."""
    try:
        with Image.open(io.BytesIO(content)) as opened:
            shown = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError):
        return f"file {content[:8]!r}" if re.match(rb"\s*<(svg|\?xml)|%PDF|8BPS", content) else None
    return hashlib.sha256(shown.tobytes() + str(shown.size).encode()).hexdigest()


def images_seen(body: Any) -> Iterator[tuple[str, str]]:
    """Yield where in an upstream's request an image is, and what tells its pixels."""
    strings: list[str] = []
    for path, value in walked(body, "body"):
        if isinstance(value, str):
            if re.search(r"\.image_url(\.url)?$", path) and value.startswith("data:"):
                yield path, pixels(base64.b64decode(value.split(",", 1)[1])) or "unreadable"
                continue
            strings.append(value)
            for found in seen_in(value):
                yield path, found
        elif (
            isinstance(value, list) and len(value) > 20 and all(type(each) is int and 0 <= each < 256 for each in value)
        ):
            found_pixels = pixels(bytes(value))
            if found_pixels:
                yield path, found_pixels
    for joined in ("".join(strings), "\n".join(strings)):
        for found in seen_in(joined):
            yield "texts one after the other", found


def walked(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    yield path, value
    if isinstance(value, dict):
        for key, each in value.items():
            yield f"{path} key", key
            yield from walked(each, f"{path}.{key}")
    elif isinstance(value, list):
        for number, each in enumerate(value):
            yield from walked(each, f"{path}[{number}]")


SHOWN = re.compile(
    r"!\[[^\]]*\]\(\s*<?\s*(?:[a-z]+:)?[/\\]{2}|<(?:img|image|source|video|input|object|picture)\b[^>]*[/\\]{2}|"
    r"url\(\s*[\"']?[a-z]*:?//",
    re.IGNORECASE,
)


def seen_in(words: str) -> Iterator[str]:
    """Yield the images that a text shows, read by the standard library's own decoders."""
    for reading in decoded(words):
        if SHOWN.search(reading):
            yield "address"
        bare = re.sub(r"\s", "", reading)
        for found in re.finditer(r"data:([^,]{0,300}),([A-Za-z0-9+/=_%-]{16,})", bare, re.IGNORECASE):
            content = unpacked(found[2])
            if content and pixels(content):
                yield f"data URL {pixels(content)}"
        for run in re.findall(r"[A-Za-z0-9+/_-]{40,}", reading):
            content = unpacked(run)
            if content and pixels(content):
                yield f"base64 {pixels(content)}"
        for run in re.findall(r"(?:[0-9a-fA-F]{2}){40,}", bare):
            found_pixels = pixels(bytes.fromhex(run))
            if found_pixels:
                yield f"hexadecimal {found_pixels}"


def decoded(words: str) -> set[str]:
    steps = (
        html.unescape,
        urllib.parse.unquote,
        lambda each: re.sub(r"\\u([0-9a-fA-F]{4})|\\x([0-9a-fA-F]{2})", lambda f: chr(int(f[1] or f[2], 16)), each),
        lambda each: each.replace("\\/", "/").replace("\\:", ":"),
        lambda each: re.sub("[\x00-\x08\x0e-\x1f\xad\u200b-\u200f\u2060-\u206f\u202a-\u202e\ufeff]", "", each),
    )
    found = {words}
    for _ in range(4):
        for step in steps:
            words = step(words)
        found.add(words)
    return found


def unpacked(run: str) -> bytes | None:
    run = run.replace("-", "+").replace("_", "/").split("=")[0]
    try:
        return base64.b64decode(run[: len(run) // 4 * 4])
    except (binascii.Error, ValueError):
        return None
