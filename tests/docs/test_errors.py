"""The errors that the FAQ shows are errors that the code can raise, word for word."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache

import pytest

from safevlm.imports.siblings import PACKAGES
from tests.docs.pages import ROOT, Block, blocks

ERRORS = tuple(blocks("error"))
FEWEST_LETTERS = 25
"""Of a message's fixed part: a shorter one matches by chance."""


def texts(tree: ast.AST) -> Iterator[list[str | None]]:
    """Yield the texts of a source, in pieces: None where a value is filled in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield [str(part.value) if isinstance(part, ast.Constant) else None for part in node.values]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield [node.value]


@cache
def messages() -> tuple[re.Pattern[str], ...]:
    """Return a pattern for each text of the packages that is long enough to be told apart."""
    found = set()
    for package in {"safevlm", *PACKAGES}:
        for path in (ROOT / package).rglob("*.py"):
            for pieces in texts(ast.parse(path.read_text(encoding="utf-8"))):
                if sum(len(piece) for piece in pieces if piece is not None) >= FEWEST_LETTERS:
                    found.add("".join(".*?" if piece is None else re.escape(piece) for piece in pieces))
    return tuple(re.compile(f"(?:error: )?{pattern}$") for pattern in found)


def test_the_faq_shows_errors() -> None:
    assert len(ERRORS) >= 12


@pytest.mark.parametrize("block", ERRORS, ids=lambda block: block.text[:40].strip())
def test_the_code_can_raise_it(block: Block) -> None:
    text = block.text.strip()
    assert any(pattern.match(text) for pattern in messages()), f"{block.page}: no source has this message:\n{text}"


def test_another_message_is_not_found() -> None:
    text = "error: build/gptq already exists. Give --out a new folder, or overwrite this one."
    assert not any(pattern.match(text) for pattern in messages())
