"""Read rows of a file that others wrote: JSON lines or a JSON list, gzip-compressed or not."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from models.errors import InputError
from models.json_file import parse_json
from models.regular_file import open_regular

__all__ = ["numbered_rows"]

MAX_BYTES = 2**31
"""Of the uncompressed text: a logged benchmark run takes a few megabytes."""


def numbered_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield each row with where it stands, such as ``file.jsonl, line 3``.

    Errors: InputError for a file that cannot be read, is empty, or holds a line that is not JSON.
    """
    text = _text(path)
    if text.lstrip().startswith("["):
        try:
            rows = parse_json(text, rows=True)
        except ValueError as error:
            raise InputError(f"{path}: not valid JSON ({error}).") from error
        yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))
        return
    if not text.strip():
        raise InputError(f"{path} is empty.")
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{path}, line {number}", _row(line, f"{path}, line {number}")


def _row(line: str, where: str) -> Any:
    try:
        return parse_json(line, rows=True)
    except ValueError as error:
        raise InputError(f"{where}: not valid JSON ({error}).") from error


def _text(path: Path) -> str:
    try:
        with open_regular(path) as file, gzip.open(file) if path.suffix == ".gz" else file as stream:
            data = stream.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise InputError(f"{path}: more than {MAX_BYTES:,} bytes of text; that is no log of a benchmark.")
        return data.decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file.") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}).") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}).") from error
