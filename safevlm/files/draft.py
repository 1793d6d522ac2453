"""A folder that is written under a hidden name beside its place, and put there in one step when it is whole."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safevlm.errors import InputError, StorageError
from safevlm.files.storage import storing

__all__ = ["PARTIAL", "draft_of", "publish", "remove_abandoned"]

PARTIAL = ".partial-"
"""Stands before the process number in the name of what is unfinished."""
REPLACED = ".replaced"
"""Ends the name of what a draft is about to replace, on file systems that cannot exchange two names."""
AT_FDCWD, RENAME_EXCHANGE = -100, 2
"""Linux's fcntl.h and fs.h."""


@contextmanager
def draft_of(out: Path) -> Iterator[Path]:
    """Give a new hidden folder beside ``out``, for :func:`publish`; what is left of it at the end is removed.

    It is locked: drafts of ``out`` whose process died are removed, those of a running one, here or in another
    container, are not. Raises StorageError where nothing can be written.
    """
    out = _place(out)
    with storing(out, advice="give --out another place"):
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(out)
        draft = out.parent / f".{out.name}{PARTIAL}{os.getpid()}-{secrets.token_hex(3)}"
        draft.mkdir()
    lock = os.open(draft, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks: the process number has to do
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        os.close(lock)


def publish(draft: Path, out: Path, *, replace: bool = False) -> None:
    """Put a draft of ``out`` in its place; with ``replace`` a folder that is there is removed, at that moment.

    A kill leaves the old folder or the new one, whole. Raises InputError when ``out`` is there and may not be
    replaced; StorageError.
    """
    out = _place(out)
    with storing(out, advice="give --out another place"):
        try:
            draft.rename(out)  # takes the place of an empty folder, too
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not out.is_dir():
                raise
            if not replace:
                raise InputError(
                    f"{out} was created by something else meanwhile. Move it away and run the command again."
                ) from error
            if not _exchange(draft, out):
                _move_aside(draft, out)


def remove_abandoned(out: Path) -> None:
    """Remove drafts of ``out``, a folder or file, whose process is gone; a folder that one had moved aside returns."""
    for draft in out.parent.glob(f".{_escaped(out.name)}{PARTIAL}*"):
        number = draft.name.rsplit(PARTIAL, 1)[1].split("-")[0].split(".")[0]
        if not number.isdigit() or not _abandoned(draft, int(number)):
            continue
        if draft.is_file():
            draft.unlink(missing_ok=True)
        elif draft.name.endswith(REPLACED) and not out.exists():
            draft.rename(out)
        else:
            shutil.rmtree(draft, ignore_errors=True)


def _place(out: Path) -> Path:
    """Return where ``out`` really lies: a link's target is what is written. Raises StorageError for a mount point."""
    with storing(out, advice="give --out another place"):
        place = out.resolve()
    if place.is_mount():
        raise StorageError(f"{out} is a mount point, which cannot be replaced in one step. Give a folder inside it.")
    return place


def _escaped(name: str) -> str:
    return "".join(f"[{sign}]" if sign in "*?[" else sign for sign in name)


def _abandoned(draft: Path, process: int) -> bool:
    if process != os.getpid() and _alive(process):
        return False
    try:
        lock = os.open(draft, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return process != os.getpid()
    finally:
        os.close(lock)
    return True


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _exchange(draft: Path, out: Path) -> bool:
    """Swap two names in one step (renameat2(2)); say whether this system and file system can."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(AT_FDCWD, os.fsencode(draft), AT_FDCWD, os.fsencode(out), RENAME_EXCHANGE) == 0:
        return True  # draft is the old one by now
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    if number == errno.ENOENT:  # somebody removed what was there
        return False
    raise OSError(number, os.strerror(number), str(out))


def _move_aside(draft: Path, out: Path) -> None:
    """Replace by two renames. A kill between them leaves both, and :func:`remove_abandoned` puts the old one back."""
    replaced = draft.with_name(draft.name + REPLACED)
    with contextlib.suppress(FileNotFoundError):
        out.rename(replaced)
    draft.rename(out)
    shutil.rmtree(replaced, ignore_errors=True)
