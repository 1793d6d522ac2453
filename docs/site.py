"""A hook of mkdocs: files that stand elsewhere in the repository become pages of the site.

A link such as ``../benchmarks/RESULTS.md`` then works where the repository is read and on the site alike.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = (
    "benchmarks/RESULTS.md",
    "benchmarks/STATISTICS.md",
    "deploy/README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
)
"""They keep their paths: on the site ``docs/`` and the repository's root are one folder."""
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#:\s]+)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> None:
    """Add the pages, each with the text of its file."""
    for name in PAGES:
        files.append(File.generated(config, name, content=(ROOT / name).read_text(encoding="utf-8")))


def on_page_markdown(markdown: str, page: Any, files: Any, **_: Any) -> str:
    """Let links between pages fit the site; of a link to another file of the repository the text remains."""
    own = page.file.src_uri
    folder = posixpath.dirname(own if own in PAGES else f"docs/{own}")

    def fitted(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, link[2]))
        on_site = target if target in PAGES else target.removeprefix("docs/")
        if on_site not in files.src_uris:
            return link[1]
        return f"[{link[1]}]({posixpath.relpath(on_site, posixpath.dirname(own) or '.')}{link[3] or ''})"

    return LINK.sub(fitted, markdown)
