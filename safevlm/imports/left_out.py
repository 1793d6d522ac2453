"""Packages that a library would import where they are installed, and that nothing here asks it to use."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["left_out"]


@contextmanager
def left_out(*packages: str) -> Iterator[None]:
    """Let packages seem not to be installed while others are imported; those that are loaded already stay.

    ``None`` in ``sys.modules`` is what the import system reads as "there is none" (reference manual, 5.3.1).
    """
    absent = [name for name in packages if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]  # None is allowed there
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]
