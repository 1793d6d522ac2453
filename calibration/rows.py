"""Rows of a JSON list or of a JSONL file, each with its place for messages, and the images that rows name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from models.errors import InputError
from models.json_file import parse_json
from models.regular_file import read_regular

__all__ = ["decoded", "file_bytes", "image_file", "json_rows", "read_rows"]

MAX_BYTES = 4 * 2**30
"""The largest published instruction sets take about 1 GB."""
JSONL_SUFFIXES = (".jsonl", ".ndjson")


def read_rows(path: Path) -> tuple[list[tuple[str, dict[str, Any]]], str]:
    """Return a file's rows, each with its place (``FILE, line 3``; in a JSON list ``FILE, row 3``), and its SHA-256.

    Errors: InputError for a file that cannot be read, is not UTF-8, not JSON, no list, or has a row that is no object.
    """
    content = file_bytes(path, "a JSON or JSONL file")
    rows = []
    for where, row in json_rows(path, decoded(path, content), "rows are read from .json and .jsonl files"):
        if not isinstance(row, dict):
            raise InputError(f"{where}: {type(row).__name__} is no row; a JSON object is needed.")
        rows.append((where, row))
    return rows, hashlib.sha256(content).hexdigest()


def file_bytes(path: Path, wanted: str) -> bytes:
    """Return a file's bytes. Errors: InputError that asks for what is ``wanted``."""
    try:
        return read_regular(path, MAX_BYTES)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}. Give {wanted}.") from error


def decoded(path: Path, content: bytes) -> str:
    """Return UTF-8 text, a byte order mark left out. Errors: InputError for other bytes."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error}). Write it again as UTF-8.") from error


def json_rows(path: Path, text: str, allowed: str) -> Iterator[tuple[str, Any]]:
    """Yield the rows of ``.json`` or ``.jsonl`` text with their places; InputError says what is ``allowed`` else."""
    suffix = path.suffix.lower()
    if suffix in JSONL_SUFFIXES:
        for number, line in enumerate(text.split("\n"), 1):  # splitlines would cut at U+2028 within a string
            if line.strip():
                yield f"{path}, line {number}", _json(line, f"{path}, line {number}")
    elif suffix == ".json":
        rows = _json(text, str(path))
        if not isinstance(rows, list):
            raise InputError(f"{path} holds {type(rows).__name__}; a list of rows is needed.")
        yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))
    else:
        raise InputError(f"{path}: {allowed}.")


def image_file(name: str, folders: Sequence[Path], where: str) -> Path:
    """Return the file that a row's image name leads to, in the first folder that has it.

    Errors: InputError when none has it.
    """
    try:
        for folder in folders:
            if (folder / name).is_file():
                return folder / name
    except (OSError, ValueError) as error:  # a name that is too long, or holds a NUL
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{where}: image {name[:80]}… cannot be looked up: {reason}. Correct its name.") from error
    looked = " and ".join(str(folder) for folder in folders)
    raise InputError(f"{where}: image {name} is missing (looked in {looked}). Name its folder with --images.")


def _json(text: str, where: str) -> Any:
    try:
        return parse_json(text, rows=True)
    except ValueError as error:
        raise InputError(f"{where} is not valid JSON ({error}).") from error
