"""JSON lines that are appended as they come, each on disk when it is written; a killed writer loses at most its last.

What the run record and the stored scores of a judge have in common.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO, TypeVar

from pydantic import BaseModel, ValidationError

from models.errors import InputError

__all__ = ["append", "first_problem", "read_lines", "replace"]


Line = TypeVar("Line", bound=BaseModel)


def read_lines(path: Path, line_type: type[Line]) -> tuple[list[Line], int, bool]:
    """Return the lines (each with an ``id``), where in bytes the last whole one ends, and whether the file ends there.

    A last line that was cut off when its writer was killed is none. Errors: InputError, with the line's number and the
    field, for a file that cannot be read, any other damage, a repeated id.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from error
    end = data.rfind(b"\n") + 1
    lines: list[Line] = []
    stands: dict[str, int] = {}
    for number, text in enumerate(data[:end].split(b"\n")[:-1], 1):
        try:
            line = line_type.model_validate_json(text)
        except ValidationError as error:
            raise InputError(f"{path}, line {number}: {first_problem(error)}") from error
        name: str = line.id  # type: ignore[attr-defined]
        if name in stands:
            raise InputError(f"{path}, line {number}: id {name!r} stands in line {stands[name]} already.")
        stands[name] = number
        lines.append(line)
    return lines, end, end == len(data)


def append(stream: IO[bytes], line: bytes) -> None:
    """Write a line so that it is on disk when this returns. Errors: OSError."""
    stream.write(line)
    stream.flush()
    os.fsync(stream.fileno())


def replace(path: Path, content: bytes) -> None:
    """Give a file another content, all of it or none. Errors: OSError."""
    unfinished = path.with_name(f".{path.name}")
    with unfinished.open("wb") as stream:
        append(stream, content)
    unfinished.replace(path)


def first_problem(error: ValidationError) -> str:
    """Return the first thing that is wrong with what was read, with its field and what was given."""
    found = error.errors(include_url=False, include_context=False)[0]
    field = ".".join(map(str, found["loc"])) or "the whole"
    return f"{field}: {found['msg']} (given: {json.dumps(found['input'], default=str)[:80]})"
