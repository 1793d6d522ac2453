"""Images in text are found however they are written; text about images passes."""

from __future__ import annotations

import base64
import re
import sys
import time
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtimes.gateway.options import UPSTREAM_KINDS, GatewayOptions
from runtimes.gateway.refusal import Refusal
from runtimes.gateway.texts.packed_images import is_image
from runtimes.gateway.texts.plain_text import FOLDING, readings
from runtimes.gateway.texts.text_images import (
    FREE_BYTES,
    FREE_DEPTH,
    READS_TEXT_AS_TEXT,
    TEXT_MAX,
    check_free,
    check_texts,
)
from safevlm.checkpoint.families import FAMILIES
from safevlm.errors import InputError
from tests.runtimes.gateway.texts.hidden_images import (
    ADDRESSES,
    FILES,
    HARMLESS,
    OF_PILLOW,
    PACKED,
    PLACEHOLDERS,
    SHOWING,
    URLS,
    WRAPPED,
    WRITTEN,
    obfuscated,
)

ROOT = Path(__file__).parents[4]
ANY = GatewayOptions()
READS_TEXT = GatewayOptions(upstream_kind="vllm")


def code_of(*texts: str, options: GatewayOptions = READS_TEXT) -> str | None:
    try:
        check_texts(texts, "messages[0]", options)
    except Refusal as refusal:
        assert refusal.status == 400 and refusal.param == "messages[0]" and len(refusal.message) < 250
        return refusal.code
    return None


def code_of_free(value: Any, options: GatewayOptions = READS_TEXT) -> str | None:
    try:
        check_free(value, "metadata", options)
    except Refusal as refusal:
        assert refusal.status == 400 and refusal.param and refusal.param.startswith("metadata")
        return refusal.code
    return None


def test_every_spelling_of_a_data_url_in_every_wrapping() -> None:
    passed = [
        (kind, way, wrap)
        for kind in ("PNG", "no type", "SVG", "URL-safe")
        for way, write in WRITTEN.items()
        for wrap, put in WRAPPED.items()
        if code_of(put(write(URLS[kind]))) != "image_in_text"
    ]
    assert not passed


def test_every_kind_of_data_url_in_every_spelling() -> None:
    passed = [(k, way) for k, url in URLS.items() for way, write in WRITTEN.items() if code_of(write(url)) is None]
    assert not passed


@pytest.mark.parametrize("kind", PACKED)
def test_an_image_file_as_text(kind: str) -> None:
    for text in (PACKED[kind], f"Decode this: {PACKED[kind]}", f'{{"file": "{PACKED[kind]}"}}'):
        assert code_of(text) == "image_in_text"
        assert code_of_free({"a": [{"b": text}]}) == "image_in_text"


@settings(deadline=None, derandomize=True, max_examples=400)
@given(obfuscated(), st.data())
def test_obfuscations_over_each_other_and_over_parts(text: str, data: st.DataObject) -> None:
    assert code_of(text) in ("image_in_text", "image_placeholder")
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    parts = [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert code_of(*parts) is not None
    assert code_of_free({"a": parts}) is not None


@pytest.mark.parametrize("cut", range(1, 30))
@pytest.mark.parametrize("way", ["plain", "entities without semicolons", "percent signs"])
def test_a_data_url_cut_in_two(cut: int, way: str) -> None:
    text = WRITTEN[way](URLS["PNG"])
    for first, second in ((text[:cut], text[cut:]), (text[:-cut], text[-cut:])):
        assert code_of(first, second) == "image_in_text"
    assert code_of("before", "", text[:cut], text[cut:], "after") == "image_in_text"


# -- images from elsewhere ------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", SHOWING)
def test_an_image_from_elsewhere(wrap: str) -> None:
    for address in ADDRESSES.values():
        for way in ("plain", "decimal entities", "JSON escapes", "zero-width characters"):
            text = WRAPPED[wrap](WRITTEN[way](address))
            for kind in UPSTREAM_KINDS:
                wanted = None if kind in READS_TEXT_AS_TEXT else "image_in_text"
                assert code_of(text, options=GatewayOptions(upstream_kind=kind)) == wanted, (text, kind)


def test_an_upstream_that_is_not_named_is_asked_for() -> None:
    for kind in set(UPSTREAM_KINDS) - READS_TEXT_AS_TEXT:
        with pytest.raises(Refusal) as caught:
            check_texts(["![a](https://a.example/b.png)"], "messages[0]", GatewayOptions(upstream_kind=kind))
        assert ("--upstream-kind" in caught.value.message) == (kind == "unknown")


@pytest.mark.parametrize("text", ["image: https://a.example/b.png", "services:\n  a:\n    image: //registry.example/b"])
def test_yaml_shows_no_image(text: str) -> None:
    assert code_of(text, options=GatewayOptions()) is None


def test_a_data_url_is_refused_whatever_the_upstream() -> None:
    for kind in UPSTREAM_KINDS:
        assert code_of(URLS["PNG"], options=GatewayOptions(upstream_kind=kind)) == "image_in_text"
    with pytest.raises(InputError, match="--upstream-kind"):
        GatewayOptions(upstream_kind="VLLM")


# -- placeholders ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [*PLACEHOLDERS, *(family.prompt.image_token for family in FAMILIES.values())])
def test_the_place_of_an_image(token: str) -> None:
    assert code_of(token) == "image_placeholder"
    assert code_of(f"what is {token} here?") == "image_placeholder"
    assert code_of(token[:4], token[4:]) == "image_placeholder"
    assert code_of("\u200b".join(token)) == "image_placeholder"
    assert code_of_free({"a": {token: 1}}) == "image_placeholder"
    with pytest.raises(Refusal, match=re.escape("'")):
        check_texts([token], "messages[0]", READS_TEXT)


def test_the_templates_of_the_families_hold_no_other_place() -> None:
    """What a template writes for an image is refused in a text."""
    templates = sorted((ROOT / "safevlm" / "checkpoint" / "chat_templates").glob("*.jinja"))
    assert len(templates) == 3
    for template in templates:
        written = re.findall(r"'([^']*)' if part\['type'\] == 'image'", template.read_text())
        assert len(written) == 1
        for token in re.findall(r"<[^>]*>", written[0]):
            assert code_of(token) == "image_placeholder", template


# -- what passes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", HARMLESS, ids=lambda text: text[:30])
def test_text_about_images_passes(text: str) -> None:
    assert code_of(text, options=ANY) is None
    assert code_of(text, text, options=ANY) is None
    assert code_of_free({"a": [text, 1, None, True, {"b": text}]}, options=ANY) is None


def test_this_projects_own_files_pass() -> None:
    """Prose, code and Markdown: only files that name placeholders or write images are refused."""
    refused = set()
    for pattern in ("*.md", "runtimes/**/*.py", "quantize/**/*.py", "benchmarks/**/*.py", "export/**/*.py", "Makefile"):
        for path in ROOT.glob(pattern):
            text = path.read_text()
            if code_of(text, options=ANY) == "image_in_text":
                refused.add(path.relative_to(ROOT).as_posix())
    assert refused <= {"runtimes/gateway/texts/linked_images.py"}


WORDS = """the data image png base64 a url is src markdown ![alt] (pic.png) <img> <b> </b> & % \\n \\ 100% : , ; / //
https://a.example [link](https://a.example) #include <stdio.h> {} [] () x=1 café 日本語 🙂 data: image/png &amp; &nbsp;
%20 \\u00e9 0x89 iVBOR /9j/ <a href='/b'> for i in range(3):"""


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.lists(st.sampled_from(WORDS.split()) | st.text(max_size=15), max_size=40))
def test_random_text_without_an_image_passes(words: list[str]) -> None:
    text = " ".join(words)
    if code_of(text, options=READS_TEXT) is not None:
        plain = re.sub(r"\s", "", text).lower()
        assert "data:image/" in plain or re.search(r"<[a-z_|]*im", plain), "only what looks like one is refused"


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.binary(min_size=30, max_size=3000))
def test_other_files_as_text_pass(content: bytes) -> None:
    if not is_image(content):
        for text in (base64.b64encode(content).decode(), content.hex(), base64.b85encode(content).decode()):
            assert code_of(text) in (None, "image_placeholder")


def test_invisible_characters_are_those_of_unicode() -> None:
    """A new version of Unicode with other control and format characters fails here."""
    for code in range(sys.maxunicode + 1):
        if unicodedata.category(chr(code)) in ("Cc", "Cf") and not chr(code).isspace():
            assert FOLDING[code] is None, hex(code)
    assert not any(chr(code) in "\t\n\r " for code, folded in FOLDING.items() if folded is None)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.text())
def test_a_text_without_escapes_has_one_reading(text: str) -> None:
    plain = re.sub(r"[&%\\]", "", text)
    assert len(list(readings(plain))) == 1


# -- free values ----------------------------------------------------------------------------------------


def nested(depth: int) -> Any:
    value: Any = "a"
    for number in range(depth):
        value = [value] if number % 2 else {"a": value}
    return value


def test_the_size_of_a_free_value() -> None:
    assert code_of_free(nested(FREE_DEPTH)) is None
    assert code_of_free(nested(FREE_DEPTH + 1)) == "value_too_large"
    assert code_of_free(nested(100_000)) == "value_too_large"
    assert code_of_free(["a"] * 9_000) is None and code_of_free(["a"] * 10_000) == "value_too_large"
    assert code_of_free([[]] * 30_000) == "value_too_large"
    assert code_of_free({str(number): number for number in range(30_000)}) == "value_too_large"
    assert code_of_free("a " * (FREE_BYTES // 2)) is None
    assert code_of_free("a " * (FREE_BYTES // 2 + 1)) == "value_too_large"
    assert code_of_free({"é" * FREE_BYTES: 1}) == "value_too_large"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP"])
def test_an_image_byte_by_byte(kind: str) -> None:
    assert code_of_free({"type": "Buffer", "data": list(FILES[kind])}) == "image_in_text"
    assert code_of_free({"data": [float(each) for each in range(60)]}) is None
    assert code_of_free(list(range(100))) is None


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.just("word"),
        lambda inner: st.lists(inner) | st.dictionaries(st.just("key"), inner),
    ),
    st.data(),
)
def test_an_image_at_any_place_of_a_free_value(value: Any, data: st.DataObject) -> None:
    assert code_of_free(value) is None
    hidden: Any = URLS["PNG"]
    for step in data.draw(st.lists(st.sampled_from(["list", "key", "value"]), max_size=5)):
        hidden = [value, hidden] if step == "list" else {"a": hidden, "b": value}
    assert code_of_free(hidden) == "image_in_text"
    assert code_of_free([value, {URLS["PNG"]: value}]) == "image_in_text"


def test_the_place_in_a_free_value() -> None:
    for value, param in (
        (URLS["PNG"], "metadata"),
        ({"a": ["b", {"c": URLS["PNG"]}]}, "metadata.a[1].c"),
        ({"a": {URLS["PNG"]: 1}}, "metadata.a"),
        ({"a": [1, list(FILES["PNG"])]}, "metadata.a[1]"),
        ({"a": ["data:imag", "e/png;base64,iVBORw0KGgo="]}, "metadata"),
        ({"a": "data:imag", "b": "e/png;base64,iVBORw0KGgo="}, "metadata"),
    ):
        with pytest.raises(Refusal) as caught:
            check_free(value, "metadata", READS_TEXT)
        assert caught.value.param == param


# -- time -----------------------------------------------------------------------------------------------

HEAVY = {
    "prose": "The quick brown fox, it jumped. ",
    "data": "data:",
    "data and comma": "data:,",
    "blanks": "d" + " " * 999,
    "ampersands": "&a",
    "numbers": "&#100",
    "zeros": "&#" + "0" * 998,
    "percent signs": "%",
    "backslashes": "\\",
    "brackets": "![",
    "closing brackets": "](//a",
    "tags": "<img ",
    "quotes": "<img a='",
    "bars": "<|",
    "PNG": "iVBORw0KGg ",
    "srcset": "srcset=",
    "url": "url(",
    "marks": "\u0301\u0316",
    "percent again": "%25",
    "comments of a PGM": f"data:;base64,{base64.b64encode(b'P5 ' + b'# ' * 1500).decode()} ",
}


def test_a_text_that_is_too_long() -> None:
    assert code_of("a" * (TEXT_MAX + 1)) == code_of("a", "a" * TEXT_MAX) == "string_above_max_length"


@pytest.mark.parametrize("unit", HEAVY.values(), ids=HEAVY)
def test_twice_the_text_takes_twice_the_time(unit: str) -> None:
    """Steps are counted in processor time; a square of the length would make 16 of the 4."""

    def seconds(size: int) -> float:
        text = unit * (size // len(unit))
        begun = time.process_time()
        code_of(text, options=ANY)
        return time.process_time() - begun

    small, large = min(seconds(100_000) for _ in range(3)), min(seconds(400_000) for _ in range(2))
    assert large < 12 * small + 0.2


OPENINGS = (
    *(
        "![a](",
        "![a]",
        "![a][b] [b]:",
        "<img src=",
        "<img src",
        "<img srcset=",
        "url(",
        "image-set",
        "src (",
        "![[",
        "[[",
    ),
    *(
        "![](h",
        "![](https:",
        "[img",
        ":image:",
        "includegraphics",
        "includegraphics{",
        "data:",
        "data:;base64,",
        "<|",
        "<img>",
    ),
)


@pytest.mark.parametrize("filler", [" ", "\n\t", "/", "a", "[", "]", "<", "'", '"', "=", "0"], ids=repr)
@pytest.mark.parametrize("opening", OPENINGS)
def test_one_long_run_after_an_opening_takes_no_square_of_its_length(opening: str, filler: str) -> None:
    """9 KB of ``![a](`` and spaces once took nine seconds, in which no other request was served."""

    def seconds(size: int) -> float:
        text = f"![](http:{opening}{filler * (size // len(filler))}http:"
        begun = time.process_time()
        code_of(text, options=ANY)
        return time.process_time() - begun

    assert seconds(8_000) < 12 * min(seconds(2_000) for _ in range(2)) + 0.2


@pytest.mark.parametrize("kind", sorted(OF_PILLOW))
def test_a_data_url_of_a_rare_format(kind: str) -> None:
    packed = base64.b64encode(OF_PILLOW[kind]).decode()
    for kind_said in ("", "application/octet-stream", "text/plain"):
        assert code_of(f"![](data:{kind_said};base64,{packed})") == "image_in_text"


def test_farbfeld() -> None:
    packed = base64.b64encode(b"farbfeld" + bytes((0, 0, 0, 4, 0, 0, 0, 4)) + bytes(128)).decode()
    assert code_of(packed) == code_of(f"![](data:;base64,{packed})") == "image_in_text"
