"""Commands of this project as a user runs them: each a child of the step, which ends with it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from safevlm.errors import SafeVLMError
from safevlm.terminal.child import module_arguments

__all__ = ["Ran", "need", "ran"]

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Ran:
    """A command that has ended; ``last`` is the last line of what it said on standard error, or else printed."""

    code: int
    output: str
    said: str

    @property
    def last(self) -> str:
        """The last words, for a message."""
        lines = (self.said.strip() or self.output.strip()).splitlines()
        return lines[-1] if lines else "it gave no reason"


def ran(module: str, *arguments: object) -> Ran:
    """Run ``python -m MODULE`` and wait for its end."""
    command = [sys.executable, *module_arguments(module, *arguments)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=ROOT, check=False)
    return Ran(done.returncode, done.stdout, done.stderr)


def need(module: str, *arguments: object, codes: tuple[int, ...] = (0,)) -> Ran:
    """Run a command that must end with one of ``codes``. Raises SafeVLMError with its last words otherwise."""
    found = ran(module, *arguments)
    if found.code not in codes:
        raise SafeVLMError(f"python -m {module} ended with {found.code}: {found.last}")
    return found
