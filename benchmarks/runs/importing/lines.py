"""Read rows of a file that others wrote: JSON lines or a JSON list, gzip-compressed or not."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from calibration.labelled.rows import json_rows
from safevlm.errors import InputError
from safevlm.files.regular_file import open_regular
from safevlm.files.text_file import decode_text

__all__ = ["numbered_rows", "text_of", "uncompressed"]

MAX_BYTES = 2**31
"""Of the uncompressed text: a logged benchmark run takes a few megabytes."""


def numbered_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield each row with where it stands, such as ``file.jsonl, line 3``.

    Raises InputError for a file that cannot be read, is empty, or holds a line that is not JSON.
    """
    text = text_of(path)
    if not text.strip():
        raise InputError(f"{path} is empty.")
    yield from json_rows(path, text, lines_first=True, halves=True)


def uncompressed(path: Path) -> Path:
    """Return what a file is called without gzip's ending."""
    return path.with_suffix("") if path.suffix == ".gz" else path


def text_of(path: Path) -> str:
    """Return a file's text, uncompressed. Raises InputError for one that cannot be read, or too much of it."""
    try:
        with open_regular(path) as file, gzip.open(file) if path.suffix == ".gz" else file as stream:
            data = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file.") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}).") from error
    if len(data) > MAX_BYTES:
        raise InputError(
            f"{path}: more than {MAX_BYTES:,} bytes of text, too many for the log of a benchmark. Give the per-sample "
            "log."
        )
    return decode_text(data, str(path))
