"""Log lines that nobody has to wait for: a reader that has stopped reading must not stop the server."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import queue
import select
import threading

__all__ = ["LineHandler"]

GONE = (errno.EPIPE, errno.EBADF)
"""Nobody reads any more, and there is nobody to tell."""
WAITING = 10_000
"""Lines that may wait to be written; later ones are dropped and counted."""


class LineHandler(logging.Handler):
    """Write each record as a line to a file descriptor, from a thread of its own."""

    def __init__(self, descriptor: int, name: str = "log") -> None:
        super().__init__()
        self._descriptor = descriptor
        self._lines: queue.Queue[bytes | None] = queue.Queue(WAITING)
        self.dropped = 0
        self._torn = False
        """Whether the last line was broken off."""
        self._thread = threading.Thread(target=self._write, name=f"gateway {name}", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a line; one that finds the queue full is dropped."""
        try:
            self._lines.put_nowait(self.format(record).encode("utf-8", "backslashreplace") + b"\n")
        except queue.Full:
            self.dropped += 1

    def finish(self, seconds: float) -> None:
        """Wait so long at most for what is queued to be written."""
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(None)
            self._thread.join(seconds)

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            told, self.dropped = self.dropped, 0
            if self._torn:
                line = b"\n" + line
            if told:
                line += b'{"dropped_lines": %d}\n' % told
            try:
                self._put(line)
            except OSError as error:
                if error.errno in GONE:
                    return
                self.dropped += told + 1  # a full disk, say, on which there may be room again

    def _put(self, line: bytes) -> None:
        """Write straight to the descriptor: a lock of ``sys.stdout``, held here, would keep the process from ending."""
        while line:
            if select.select([], [self._descriptor], [], None)[1]:
                line = line[os.write(self._descriptor, line) :]
                self._torn = bool(line)
