"""A log that nobody reads stops nobody."""

from __future__ import annotations

import errno
import logging
import os

import pytest

from runtimes.gateway.logs import WAITING, LineHandler


def record(message: str) -> logging.LogRecord:
    return logging.LogRecord("a", logging.INFO, "", 0, message, (), None)


def test_lines_come_out_in_order() -> None:
    reader, writer = os.pipe()
    handler = LineHandler(writer)
    for number in range(100):
        handler.emit(record(f"{number} \ud83d"))
    handler.finish(600)
    os.close(writer)
    with os.fdopen(reader, encoding="ascii") as lines:
        assert lines.read().splitlines() == [f"{number} \\ud83d" for number in range(100)]


def test_a_pipe_that_is_full_holds_up_nobody_and_what_was_dropped_is_counted() -> None:
    reader, writer = os.pipe()
    handler = LineHandler(writer)
    for _ in range(WAITING + 2000):
        handler.emit(record("x" * 1000))  # more than the pipe and the queue hold
    assert handler.dropped > 0
    seen = 0
    with os.fdopen(reader, "rb") as lines:
        while seen < WAITING + 2000:
            line = lines.readline()
            seen += int(line.split(b":")[1].rstrip(b"}\n")) if line.startswith(b"{") else 1
    handler.finish(600)
    os.close(writer)


def test_a_reader_that_has_left_is_no_error() -> None:
    reader, writer = os.pipe()
    handler = LineHandler(writer)
    os.close(reader)
    handler.emit(record("x"))
    handler.finish(600)
    os.close(writer)


def test_a_disk_that_is_full_for_a_while_loses_lines_and_not_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was broken off stays a line of its own, so that every other line can be read."""
    reader, writer = os.pipe()
    write, failures = os.write, iter((False, True, False))

    def half(descriptor: int, content: bytes) -> int:
        if descriptor != writer:
            return write(descriptor, content)
        if next(failures, False):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, content[: len(content) // 2]) if b"lost" in content else write(descriptor, content)

    monkeypatch.setattr(os, "write", half)
    handler = LineHandler(writer)
    for message in ("lost", "kept", "last"):
        handler.emit(record(message))
    handler.finish(600)
    os.close(writer)
    with os.fdopen(reader, encoding="ascii") as lines:
        assert lines.read().splitlines() == ["lo", "kept", '{"dropped_lines": 1}', "last"]
