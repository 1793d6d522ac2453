"""Open regular files only: a FIFO would hang its reader, a device never end, a folder or socket is no file.

Every file that strangers may have written is opened here. Errors are OSError, whose ``strerror`` says what is wrong,
so that each reader reports them as it reports a file that is missing.
"""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader, FileIO
from pathlib import Path

__all__ = ["is_file", "is_folder", "open_regular", "open_to_append", "read_regular", "require_regular"]

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO (named pipe)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: Path | str) -> BufferedReader:
    """Open a file for reading, links followed, without ever waiting for a writer.

    What is opened is what is checked: the kind is asked of the open descriptor, so nothing can be swapped in between.

    Raises:
        OSError: The file is missing, not readable, not regular, or its path cannot be one.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except ValueError as error:  # a NUL or a lone surrogate in the path
        raise OSError(errno.EINVAL, f"not a file path: {error}", str(path)) from None
    except OSError as error:
        if error.errno == errno.ENXIO:  # what opening a socket gives
            raise OSError(errno.EINVAL, "a socket or device, not a regular file", str(path)) from None
        raise
    try:
        kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
        if kind != stat.S_IFREG:
            number = errno.EISDIR if kind == stat.S_IFDIR else errno.EINVAL
            raise OSError(number, f"{KINDS.get(kind, 'something else')}, not a regular file", str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: Path | str, limit: int) -> bytes:
    """Return the content of a regular file of at most ``limit`` bytes.

    Raises:
        OSError: As :func:`open_regular`, and with EFBIG for a file that is larger; of that one nothing is kept.
    """
    with open_regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        content = b"" if size > limit else stream.read(limit + 1) or b""
    if max(size, len(content)) > limit:
        raise OSError(errno.EFBIG, f"{max(size, len(content)):,} bytes; at most {limit:,} are allowed", str(path))
    return content


def open_to_append(path: Path | str) -> FileIO:
    """Open a file, or a pipe that is being read, for writing behind what it holds, without ever waiting for a reader.

    Nothing is buffered: a write that fails is not tried again when the file is closed.

    Raises:
        OSError: It cannot be written, or is a FIFO that nobody reads.
    """
    try:
        stream = FileIO(
            path, "ab", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK | os.O_NOCTTY, 0o666)
        )
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise OSError(errno.ENXIO, "a FIFO that nobody reads, a socket or a device", str(path)) from None
        raise
    os.set_blocking(stream.fileno(), True)
    return stream


def require_regular(path: Path | str) -> None:
    """Check a file that a library is about to open by its path; between the two it could still be swapped.

    Raises:
        OSError: As :func:`open_regular`.
    """
    open_regular(path).close()


def is_folder(path: Path | str) -> bool:
    """Say whether there is such a folder; a path that cannot be one is none (``Path.is_dir`` raises then)."""
    return os.path.isdir(path)  # noqa: PTH112


def is_file(path: Path | str) -> bool:
    """Say whether there is such a regular file; a path that cannot be one is none (``Path.is_file`` raises then)."""
    return os.path.isfile(path)  # noqa: PTH113
