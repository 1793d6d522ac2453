"""The user's cache folder: what can be made again, and is not worth a place in a project."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["user_cache"]


def user_cache() -> Path:
    """Return this project's folder in the user's cache, which need not exist yet (XDG Base Directory)."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "safevlm-edge"
