"""Step 8: the tests that need a GPU, ``pytest -m gpu``."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu_proof.finding import Finding, Task, failed, proved, unproved
from safevlm.terminal.child import module_arguments

__all__ = ["files_marked", "prove"]

ROOT = Path(__file__).parents[3]
MARK = re.compile(r"\bmark\.gpu\b")
ENDED = re.compile(r"^(PASSED|FAILED|ERROR|SKIPPED)\s+(.*)$", re.MULTILINE)


def prove(request: Mapping[str, Any]) -> Iterator[Finding]:
    """Run them; each is a finding. Only files with such tests are read: others need packages that may be missing."""
    task = Task.of(request)
    files = files_marked(ROOT / "tests")
    if not files:
        yield unproved("the tests that need a GPU", f"{ROOT / 'tests'} holds none: run this in the repository")
        return
    only = ["--collect-only"] if task.dry else []
    words = module_arguments("pytest", "-mgpu", "-rA", "-q", "-pno:cacheprovider", *only, *files)
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    sys.stderr.write(done.stdout + done.stderr)
    lines = done.stdout.strip().splitlines() or ["pytest said nothing"]
    if done.returncode not in (0, 1):
        yield failed("the tests that need a GPU", f"pytest ended with {done.returncode}: {lines[-1]}")
    elif task.dry:
        yield unproved("the tests that need a GPU", f"no GPU (dry run): {lines[-1]}")
    else:
        yield from _tests(done.stdout)


def _tests(printed: str) -> Iterator[Finding]:
    for state, told in ENDED.findall(printed):
        name, _, reason = told.partition(" - ")
        if state == "PASSED":
            yield proved(name)
        elif state == "SKIPPED":
            yield unproved("a test that needs a GPU", told)
        else:
            yield failed(name, reason or state.lower())


def files_marked(tests: Path) -> list[Path]:
    """Return the test files that mark a test with ``gpu``."""
    return [path for path in sorted(tests.rglob("test_*.py")) if MARK.search(path.read_text(encoding="utf-8"))]
