"""Files of keys: such that not everybody on this machine may read, or write."""

from __future__ import annotations

import stat
from pathlib import Path

from safevlm.errors import InputError
from safevlm.files.regular_file import read_regular
from safevlm.files.text_file import decode_text
from safevlm.terminal.api_key import checked_key

__all__ = ["check_private", "read_key_file"]

MAX_BYTES = 64 * 1024


def check_private(path: Path) -> None:
    """Raise InputError where everybody on this machine may read or write a file of keys."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        raise InputError(f"{path}: it cannot be read ({error.strerror}).") from error
    if mode & (stat.S_IROTH | stat.S_IWOTH):
        raise InputError(
            f"{path}: every user of this machine may read or write it. Run: chmod 600 {path} (in a container, mount "
            "the secret with the mode 0440)"
        )


def read_key_file(path: Path) -> str:
    """Return the only line of a file: a key. Raises InputError, which never quotes it."""
    check_private(path)
    try:
        content = read_regular(path, MAX_BYTES)
    except OSError as error:
        raise InputError(f"{path}: it cannot be read ({error.strerror}). It must hold one key.") from error
    key = decode_text(content, str(path)).strip()
    if not key:
        raise InputError(f"{path} is empty. It must hold one key.")
    return checked_key(key, str(path))
