"""The pages of the documentation in the order in which they are read, and the marked blocks in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAV = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
LISTED = tuple(re.findall(r": ([\w/-]+\.md)$", NAV, re.MULTILINE))
PAGES = tuple(ROOT / "docs" / name for name in LISTED if not (ROOT / name).is_file())
"""Those of docs/. The others that mkdocs.yml lists stand elsewhere in the repository."""
BLOCK = re.compile(r"<!-- (?P<mark>[\w ,:-]+) -->\n```(?P<language>\w*)\n(?P<text>.*?)```", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block behind a mark such as ``<!-- run -->``."""

    page: str
    mark: str
    language: str
    text: str


def documents() -> tuple[Path, ...]:
    """Return README.md and all pages."""
    return (ROOT / "README.md", *PAGES)


def blocks(*marks: str) -> Iterator[Block]:
    """Yield the blocks with one of these marks, in reading order."""
    for page in documents():
        for found in BLOCK.finditer(page.read_text(encoding="utf-8")):
            if found["mark"] in marks:
                yield Block(str(page.relative_to(ROOT)), found["mark"], found["language"], found["text"])
