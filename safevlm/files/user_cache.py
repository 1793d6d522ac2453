"""The user's cache folder: what can be made again, and is not worth a place in a project."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from safevlm.errors import StorageError
from safevlm.files.json_file import replace_file
from safevlm.files.regular_file import open_regular
from safevlm.files.storage import storing

__all__ = ["keep_newest", "read_own", "user_cache", "write_own"]

OTHERS_WRITE = 0o022


def user_cache() -> Path:
    """Return this project's folder in the user's cache, which need not exist yet (XDG Base Directory).

    Raises StorageError for a user without a home.
    """
    root = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(root) if root else Path.home() / ".cache") / "safevlm-edge"
    except RuntimeError as error:
        raise StorageError(f"there is no cache folder ({error}). Set XDG_CACHE_HOME to one.") from error


def read_own(path: Path, limit: int) -> bytes:
    """Return the content of a regular file of at most ``limit`` bytes that this user alone can have written.

    Raises:
        OSError: As :func:`safevlm.files.regular_file.read_regular`; with EPERM for a file that belongs to somebody
            else or that others may write.
    """
    with open_regular(path) as stream:
        stated = os.fstat(stream.fileno())
        if stated.st_uid != os.geteuid() or stated.st_mode & OTHERS_WRITE:
            raise OSError(errno.EPERM, "it belongs to another user, or others may write it", str(path))
        content = b"" if stated.st_size > limit else stream.read(limit + 1)
    if max(stated.st_size, len(content)) > limit:
        raise OSError(errno.EFBIG, f"{max(stated.st_size, len(content)):,} bytes, {limit:,} are allowed", str(path))
    return content


def write_own(path: Path, content: bytes) -> None:
    """Give a file of the cache another content, all of it or none, that nobody else may write. Raises StorageError."""
    with storing(path, kept="Nothing there was changed.", advice="set XDG_CACHE_HOME to a folder with room"):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        replace_file(path, content, mode=0o600)


def keep_newest(folder: Path, pattern: str, most: int) -> None:
    """Remove all but the newest files of a kind; one that another process removes at the same time is none.

    Raises StorageError.
    """
    with storing(folder, kept="", advice="remove it"):
        for path in sorted(folder.glob(pattern), key=_written, reverse=True)[most:]:
            path.unlink(missing_ok=True)


def _written(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0
