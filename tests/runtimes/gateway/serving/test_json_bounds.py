"""The bounds are those of the parsed value, whatever stands in its strings, and cost next to nothing."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtimes.gateway.serving.json_bounds import JsonSizeError, check_json

TEXTS = st.text(st.sampled_from('a"\\[]{},:\n\u00e9\u2c2c\ud83d'), max_size=8)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)


def size(value: Any) -> tuple[int, int]:
    """Return how many values and levels there are."""
    if not isinstance(value, list | dict):
        return 1, 0
    inner = [size(each) for each in (value.values() if isinstance(value, dict) else value)]
    return 1 + sum(nodes for nodes, _ in inner), 1 + max((depth for _, depth in inner), default=0)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(VALUES, st.booleans())
def test_the_bounds_are_those_of_the_value(value: Any, ascii_only: bool) -> None:
    content = json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    nodes, depth = size(value)
    check_json(content, nodes=2 * nodes, depth=depth)  # an empty array counts as one that holds something
    if depth:
        with pytest.raises(JsonSizeError, match="levels"):
            check_json(content, nodes=2 * nodes, depth=depth - 1)
    if nodes > 1:
        with pytest.raises(JsonSizeError, match="values"):
            check_json(content, nodes=nodes - 1, depth=depth)


@pytest.mark.parametrize(
    "content",
    [
        b"[" + b"[]," * 2_800_000 + b"[]]",
        b"[" + b'"",' * 2_800_000 + b"0]",
        b'{"a":' * 1_000_000,
        b"[" + b"1," * 4_000_000 + b"1]",
        b'["\\\\\\""' + b",[]" * 1_000_000 + b"]",
        b"[" * 101 + b"]" * 101,
        b"[" + (b"1" * 4000 + b",") * 2000 + b"1]",
        b"[1." + b"1" * 100_000 + b"]",
    ],
)
def test_texts_that_are_small_and_become_large(content: bytes) -> None:
    with pytest.raises(JsonSizeError):
        check_json(content, nodes=100_000, depth=100)


@pytest.mark.parametrize(
    "content", [b'"' + b"[],{}" * 1_000_000 + b'"', b'"' + b'\\"[],' * 1_000_000 + b'"', b" " * 1_000_000 + b"1"]
)
def test_what_stands_in_a_string_counts_for_nothing(content: bytes) -> None:
    check_json(content, nodes=100_000, depth=100)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_encodings_are_no_json(encoding: str) -> None:
    with pytest.raises(ValueError, match="NUL"):
        check_json(json.dumps({"a": ["\\"]}).encode(encoding), nodes=100, depth=10)
