"""Pieces of a growing answer are its text, and no half characters."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from safevlm.network.text_stream import TextStream


def decode(ids: Sequence[int]) -> str:
    return bytes(ids).decode("utf-8", "replace")


@given(st.text(max_size=40))
def test_pieces_are_the_text_without_outer_blanks(text: str) -> None:
    stream = TextStream(decode)
    pieces = [stream.add(byte) for byte in text.encode()]
    pieces.append(stream.end())
    assert "".join(pieces) == text.strip()
    assert not any("\ufffd" in piece for piece in pieces if "\ufffd" not in text)


def test_a_character_is_told_when_it_is_whole() -> None:
    stream = TextStream(decode)
    assert [stream.add(byte) for byte in " h\u00e9".encode()] == ["", "h", "", "\u00e9"]
