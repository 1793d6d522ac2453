"""Random changes of a good JSON document, as somebody makes them who wants its reader to fall."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(st.characters(codec="utf-8"), max_size=20)
    | st.sampled_from(["\x1b[2J", "\u202e", "x" * 20_000, "../x", "\0", 10**90, 1e308, -0.0, 2, 1.0, 65_535]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


def places(value: Any, at: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Return the way to every field and item of a document."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [way for key, each in inner for way in ((*at, key), *places(each, (*at, key)))]


@st.composite
def mutated(draw: st.DrawFn, good: Any) -> bytes:
    """Return the text of ``good`` with a field replaced, dropped, added or doubled, or with bytes changed."""
    content = copy.deepcopy(good)
    for _ in range(draw(st.integers(1, 2))):
        *way, last = draw(st.sampled_from(places(content)))
        holder = content
        for key in way:
            holder = holder[key]
        how = draw(st.sampled_from(["replace", "replace", "drop", "add"]))
        if how == "replace":
            holder[last] = draw(VALUES)
        elif how == "drop":
            del holder[last]
        elif isinstance(holder, dict):
            holder[draw(st.text(max_size=5))] = draw(VALUES)
    text = json.dumps(content)
    if draw(st.integers(0, 9)) == 0:
        text = text.replace(": ", f": 1, {json.dumps(draw(st.text(max_size=3)))}: ", 1)
    raw = bytearray(text.encode())
    if draw(st.integers(0, 9)) == 0:
        raw[draw(st.integers(0, len(raw) - 1))] = draw(st.integers(0, 255))
    return bytes(raw)
