"""JSON lines that are appended as they come, each on disk when it is written; a killed writer loses at most its last.

What the run record and the stored scores of a judge have in common.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from safevlm.errors import InputError
from safevlm.files.json_file import first_problem, validate_json
from safevlm.files.regular_file import read_regular
from safevlm.files.storage import storing
from safevlm.terminal.printable import shortened

__all__ = ["KEPT", "append", "changes", "read_lines"]


MAX_BYTES = 4 * 2**30
"""A row with its answer takes a kilobyte or two."""
KEPT = "What was written is kept: continue with --resume."
Line = TypeVar("Line", bound=BaseModel)


def read_lines(path: Path, line_type: type[Line]) -> tuple[list[Line], int, bool]:
    """Return the lines (each with an ``id``), where in bytes the last whole one ends, and whether the file ends there.

    A last line that was cut off when its writer was killed is none. Raises InputError, with the line's number and the
    field, for a file that cannot be read, any other damage, a repeated id.
    """
    try:
        data = read_regular(path, MAX_BYTES)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from error
    end = data.rfind(b"\n") + 1
    lines: list[Line] = []
    stands: dict[str, int] = {}
    for number, text in enumerate(data[:end].split(b"\n")[:-1], 1):
        try:
            line = validate_json(line_type, text, halves=True)
        except ValueError as error:
            raise InputError(f"{path}, line {number}: {first_problem(error)}") from error
        name: str = line.id  # type: ignore[attr-defined]
        if name in stands:
            raise InputError(
                f"{path}, line {number}: id {shortened(name)!r} is already on line {stands[name]}. "
                "Remove one of the two lines."
            )
        stands[name] = number
        lines.append(line)
    return lines, end, end == len(data)


def changes(before: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Return what a resumed journal's settings were and are, one text a setting that differs."""
    found: list[str] = []
    for key in sorted({*before, *wanted}):
        was, now_is = before.get(key), wanted.get(key)
        if isinstance(was, Mapping) and isinstance(now_is, Mapping):
            found += [f"{key}.{each}" for each in changes(was, now_is)]
        elif was != now_is:
            found.append(f"{key} was {shortened(repr(was))}, is {shortened(repr(now_is))}")
    return found


def append(stream: FileIO, line: bytes) -> None:
    """Write a line to an unbuffered file so that it is on disk when this returns.

    Raises StorageError; a part of the line may be there then, which :func:`read_lines` drops.
    """
    with storing(Path(stream.name), KEPT, "give another --out"):
        rest = memoryview(line)
        while rest:
            rest = rest[stream.write(rest) :]
        os.fsync(stream.fileno())
