"""The site builds, strictly: no broken link or anchor, no page outside the navigation."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT

MKDOCS = ROOT / ".venv-docs" / "bin" / "mkdocs"


@pytest.mark.skipif(not MKDOCS.is_file(), reason="no mkdocs in .venv-docs; make peers")
def test_it_builds(tmp_path: Path) -> None:
    command = [MKDOCS, "build", "--strict", "--site-dir", tmp_path / "site"]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for page in PAGES:
        name = page.relative_to(ROOT / "docs").with_suffix("")
        assert (tmp_path / "site" / ("" if name.name == "index" else name) / "index.html").is_file()
    assert "overview.svg" in (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert 'href="../benchmarks/RESULTS/"' in (tmp_path / "site" / "split" / "index.html").read_text(encoding="utf-8")
