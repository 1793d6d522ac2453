"""What people read is in the project's words: one word for one idea, in help texts, errors and notes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
READ = ("safevlm", "calibration", "benchmarks", "export", "quantize", "runtimes")
"""Folders whose modules are looked through."""
INSTEAD = {
    r"pictures?": "image",
    r"(go|goes|going|gone) on": "resume, continue",
    r"told|tells?": "report, print, say",
    r"(is|are) (none|no)(?! longer| more)(?<!there is no)(?<!there are no)": "is not",
    r"what is none|of which there": "name the thing",
    r"(is|are) (not )?taken": "is accepted",
    r"anew": "again",
    r"stands? in": "is in",
    r"mend": "fix",
    r"passed over": "skipped",
}
"""Words that no sentence for people has, and what it says instead."""
NAMES = {ROOT / "safevlm" / "imports" / "moved.py"}
"""Modules whose strings are names."""
QUESTIONS = frozenset({"What is in the picture?"})
"""What a model is asked: measured with these words, so they stay."""


def sentences(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and text of each string of several words that is neither docstring nor markup; {} for a value."""
    silent = {id(each.value) for each in ast.walk(tree) if isinstance(each, ast.Expr)}
    silent |= {id(part) for each in ast.walk(tree) if isinstance(each, ast.JoinedStr) for part in each.values}
    for node in ast.walk(tree):
        if id(node) in silent or not isinstance(node, (ast.Constant, ast.JoinedStr)):
            continue
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        text = "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in parts)
        is_text = any(isinstance(part, ast.Constant) and isinstance(part.value, str) for part in parts)
        if is_text and " " in text.strip() and not text.startswith("<") and text not in QUESTIONS:
            yield node.lineno, text


@pytest.mark.parametrize("folder", READ)
def test_one_idea_has_one_word(folder: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text!r} has {word[0]!r}: {instead}"
        for path in sorted({*(ROOT / folder).rglob("*.py")} - NAMES)
        for line, text in sentences(ast.parse(path.read_text(encoding="utf-8")))
        for pattern, instead in INSTEAD.items()
        for word in re.finditer(rf"\b(?:{pattern})\b", text, re.IGNORECASE)
    ]
    assert not found, "\n".join(found)


def test_a_forbidden_word_is_found_in_every_kind_of_string() -> None:
    source = 'def f(x):\n    """A picture."""\n    raise E(f"{x}: the picture " "is missing", help="no picture here")'
    assert [text for _, text in sentences(ast.parse(source))] == ["{}: the picture is missing", "no picture here"]
