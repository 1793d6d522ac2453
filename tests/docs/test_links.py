"""Every link leads somewhere: to a file of the repository, and to a heading where it names one."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT, documents

LINKED = (
    *documents(),
    *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "deploy/README.md")),
    *(ROOT / "benchmarks").glob("*.md"),
)
LINK = re.compile(r"\]\(([^)\s]+)\)")
PICTURES = sorted((ROOT / "docs" / "assets").glob("*.svg"))


def slug(heading: str) -> str:
    """Return a heading's anchor, as GitHub and mkdocs both write it."""
    return re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading.replace("`", "").strip().lower()))


def anchors(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if link.startswith(("https://", "http://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_in_the_navigation() -> None:
    assert set((ROOT / "docs").rglob("*.md")) == set(PAGES)


@pytest.mark.parametrize("picture", PICTURES, ids=lambda path: path.name)
def test_a_picture_is_readable_by_day_and_night_and_without_eyes(picture: Path) -> None:
    text = picture.read_text(encoding="utf-8")
    root = ET.fromstring(text)
    names = {element.tag.partition("}")[2]: (element.text or "").strip() for element in root}
    assert names["title"] and names["desc"]
    assert "prefers-color-scheme: dark" in text
    assert not re.search(r"(?:href|src|url\()\W*https?:", text), "it loads something from elsewhere"
    day, night = (set(re.findall(r"--([\w-]+):", part)) for part in text.split("@media")[:2])
    assert day == night, "a colour has no counterpart"
