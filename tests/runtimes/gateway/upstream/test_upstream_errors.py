"""An upstream's own errors keep their status and words, in whichever shape they come, and never hold a key of ours."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtimes.gateway.upstream.errors import MAX_WORDS, stated_error, upstream_words

WORDS = "context is too long"
SHAPES: dict[str, Any] = {
    "OpenAI": {"error": {"message": WORDS, "type": "invalid_request_error", "param": "messages", "code": "too_long"}},
    "OpenAI, message only": {"error": {"message": WORDS}},
    "vLLM, flat": {"object": "error", "message": WORDS, "type": "BadRequestError", "param": None, "code": 400},
    "FastAPI": {"detail": WORDS},
    "FastAPI, list": {"detail": [{"loc": ["body", "n"], "msg": WORDS, "type": "value_error"}, {"msg": "more"}]},
    "FastAPI around OpenAI": {"detail": {"error": {"message": WORDS, "type": "x"}}},
    "TGI": {"error": WORDS, "error_type": "validation"},
    "Google": [{"error": {"code": 400, "message": WORDS, "status": "INVALID_ARGUMENT"}}],
    "a message": {"message": WORDS},
    "unknown": {"reason": WORDS},
    "text": f"{WORDS}\r\n",
    "HTML": f"<html><head><title>{WORDS}</title></head><body><p>x</body></html>",
    "HTML without a title": f"<style>p {{}}</style><p class='a'>{WORDS}</p>",
}


def shaped(found: dict[str, Any]) -> dict[str, Any]:
    assert set(found) == {"error"} and set(found["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = found["error"]
    assert isinstance(error["message"], str) and isinstance(error["type"], str) and error["message"] and error["type"]
    assert all(isinstance(error[key], str | None) for key in ("param", "code"))
    return error


@pytest.mark.parametrize("status", [400, 422, 500, 529])
@pytest.mark.parametrize("kind", SHAPES)
def test_the_words_come_through(kind: str, status: int) -> None:
    shape = SHAPES[kind]
    content = shape if isinstance(shape, str) else json.dumps(shape)
    error = shaped(upstream_words(status, content.encode()))
    assert WORDS in error["message"] and len(error["message"]) < 200 and "<" not in error["message"]
    if isinstance(shape, str) or kind == "unknown":
        assert f"HTTP {status}" in error["message"], "they are said to be the upstream's"
    if kind == "OpenAI":
        assert (error["param"], error["code"]) == ("messages", "too_long")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["error", "message", "detail", "object", "type", "param", "code", "msg", "loc"]), inner
        )
    ),
    max_leaves=10,
)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(JSON.map(json.dumps).map(str.encode) | st.binary(max_size=50), st.sampled_from([400, 401, 404, 500, 599]))
def test_any_body_makes_an_error_of_openais_shape(content: bytes, status: int) -> None:
    shaped(upstream_words(status, content))


@pytest.mark.parametrize("kind", SHAPES)
def test_no_key_of_ours_is_quoted(kind: str) -> None:
    key = "sk-of-the-server"
    shape = SHAPES[kind]
    content = (shape if isinstance(shape, str) else json.dumps(shape)).replace(WORDS, f"wrong: {key}")
    assert key not in json.dumps(upstream_words(400, content.encode(), key.encode()))


@pytest.mark.parametrize("content", [b"x" * 1_000_000, b"<" * 1_000_000, b"<a" * 500_000, b"<title" * 100_000])
def test_long_words_are_cut(content: bytes) -> None:
    assert len(shaped(upstream_words(500, content))["message"]) <= MAX_WORDS
    long = json.dumps({"detail": content.decode()[:200_000]}).encode()
    assert len(shaped(upstream_words(500, long))["message"]) <= MAX_WORDS


@pytest.mark.parametrize(
    "event", [{"choices": []}, {"choices": [], "usage": {}}, {"message": "x"}, {"detail": "x"}, {"error": None}]
)
def test_what_is_no_error_in_a_stream_passes_as_it_is(event: dict[str, Any]) -> None:
    assert stated_error(event, 200) is None
