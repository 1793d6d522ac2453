"""Standard input, output and error of a command, whatever they were started as.

A stream that is closed (``>&-``), a pipe whose reader has gone, a full disk behind ``> file``, a locale that lacks a
letter: none of them stops a command or changes what it decides. What is lost is reported by :func:`settled`.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = ["settled", "standard_streams"]

LOST = 2
"""Exit code of a command that went well, but whose answer could not be written."""


class _Sink(io.RawIOBase):
    """A file descriptor to write to, whose first failure is kept, and after it all that is written dropped."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self.failure: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: ReadableBuffer, /) -> int:
        if self.failure is not None:
            return memoryview(data).nbytes
        try:
            return os.write(self._descriptor, data)
        except BlockingIOError:  # somebody made the terminal or pipe so
            select.select([], [self._descriptor], [])
        except OSError as error:
            self.failure = error
        return self.write(data)


@contextmanager
def standard_streams() -> Iterator[None]:
    """Give the three streams a place each while the context lasts; streams that a caller put there stay as they are."""
    _open_closed()
    before: tuple[Any, Any, Any] = (sys.stdin, sys.stdout, sys.stderr)
    if before[0] is None:
        sys.stdin = Path(os.devnull).open(encoding="utf-8")  # noqa: SIM115  # for as long as the command lasts
    sys.stdout = _enduring(sys.stdout, sys.__stdout__, 1)
    sys.stderr = _enduring(sys.stderr, sys.__stderr__, 2)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdin, sys.stdout, sys.stderr = before


def settled(code: int) -> int:
    """Return the exit code of a command that decided for ``code``, once all it said has been written.

    An answer that could not be written is said so on standard error and turns 0 into 2. A reader that left early (a
    closed pipe) has had what it wanted, and any other code stands: it is the verdict.
    """
    sys.stdout.flush()
    failure = _failure(sys.stdout)
    if failure is not None and failure.errno != errno.EPIPE:
        sys.stderr.write(
            f"error: standard output cannot be written: {failure.strerror}. Part of the output is lost. "
            "Write it elsewhere and run the command again.\n"
        )
        code = code or LOST
    sys.stderr.flush()
    return code


def _failure(stream: TextIO) -> OSError | None:
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    return raw.failure if isinstance(raw, _Sink) else None


def _enduring(stream: TextIO | None, original: TextIO | None, descriptor: int) -> TextIO:
    if stream is None:
        return Path(os.devnull).open("w", encoding="utf-8")
    if stream is not original or not isinstance(stream, io.TextIOWrapper):
        return stream  # a caller's own
    with contextlib.suppress(OSError):  # what was said before this; the new stream will find the same
        stream.flush()
    sink = _Sink(descriptor)
    return io.TextIOWrapper(
        io.BufferedWriter(sink),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=descriptor == 2 or sink.isatty(),
    )


def _open_closed() -> None:
    """Put the null device where a standard descriptor is closed: the next file to be opened would take its number."""
    for descriptor in filter(_is_closed, (0, 1, 2)):
        null = os.open(os.devnull, os.O_RDWR)
        if null != descriptor:
            os.dup2(null, descriptor)
            os.close(null)
        os.set_inheritable(descriptor, True)


def _is_closed(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return True
    return False
