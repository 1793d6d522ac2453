"""Run a command and watch it from outside: time, most resident memory, bytes read and written (Linux, proc(5))."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safevlm.errors import InputError

__all__ = ["Watched", "watch"]

POLL_SECONDS = 0.02
SAID = 2000


@dataclass(frozen=True, kw_only=True)
class Watched:
    """One run: ``peak_bytes`` is VmHWM; ``read_bytes`` and ``written_bytes`` are what system calls moved.

    Pages of a mapped file are read without a call: they are in the peak, not among the bytes. ``said`` is the end of
    what was printed.
    """

    command: str
    code: int
    seconds: float
    peak_bytes: int
    read_bytes: int
    written_bytes: int
    said: str


def watch(arguments: Sequence[str]) -> Watched:
    """Run ``python ARGUMENTS`` and return what was seen of it. Raises InputError on a system without /proc."""
    if not Path("/proc/self/io").is_file():
        raise InputError("memory and reads are measured in /proc, which only Linux has. Run this on Linux.")
    begun = time.monotonic()
    with subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        folder = Path("/proc", str(process.pid))
        peak, read, written = 0, 0, 0
        lines: list[str] = []
        assert process.stdout is not None
        stream = process.stdout
        reader = threading.Thread(target=lambda: lines.extend(stream), daemon=True)
        reader.start()
        while process.poll() is None:
            numbers = _numbers(folder)
            peak = max(peak, numbers.get("VmHWM", 0) * 1024)
            read, written = max(read, numbers.get("rchar", 0)), max(written, numbers.get("wchar", 0))
            time.sleep(POLL_SECONDS)
        reader.join()
    return Watched(
        command="python " + " ".join(arguments),
        code=process.returncode,
        seconds=time.monotonic() - begun,
        peak_bytes=peak,
        read_bytes=read,
        written_bytes=written,
        said="".join(lines)[-SAID:],
    )


def _numbers(folder: Path) -> dict[str, int]:
    """Return what /proc says of a process; nothing when it has just ended."""
    found: dict[str, int] = {}
    for name in ("status", "io"):
        try:
            text = (folder / name).read_text(encoding="ascii", errors="replace")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            return found
        for line in text.splitlines():
            key, _, value = line.partition(":")
            if key in ("VmHWM", "rchar", "wchar"):
                found[key] = int(value.split()[0])
    return found
