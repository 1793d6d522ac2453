"""Rows of JSON, JSON Lines or a table, each with its place for messages, and the images that rows name."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from calibration.labelled.tables import TABLE_SUFFIXES, Columns, cleaned, column_name, table_rows
from safevlm.errors import InputError
from safevlm.files.json_file import parse_json
from safevlm.files.regular_file import read_regular
from safevlm.files.text_file import decode_text

__all__ = ["file_bytes", "image_file", "image_name", "is_nothing", "json_rows", "read_rows", "rows_of"]

MAX_BYTES = 4 * 2**30
"""The largest published instruction sets take about 1 GB."""
JSONL_SUFFIXES = (".jsonl", ".ndjson")
JSON_SUFFIXES = (".json", *JSONL_SUFFIXES)
REMOTE = ("http:", "https:", "data:")
CONVERSATION = ("messages", "conversations")
WINDOWS_ROOT = re.compile(r"[A-Za-z]:[\\/]|\\\\")


def read_rows(path: Path, columns: Columns) -> tuple[list[tuple[str, dict[str, Any]]], str]:
    """Return a file's rows, each with its place (``FILE, line 3``; in a JSON list ``FILE, row 3``), and its SHA-256.

    Raises InputError for a file that cannot be read, is no text, no JSON or table with ``columns``, or has a row that
    is no object.
    """
    content = file_bytes(path, "a JSON, JSONL or CSV file")
    rows = []
    for where, row in rows_of(path, content, columns, what="rows"):
        if not isinstance(row, dict):
            raise InputError(f"{where}: a row must be a JSON object, not {type(row).__name__}.")
        rows.append((where, row))
    return rows, hashlib.sha256(content).hexdigest()


def file_bytes(path: Path, wanted: str) -> bytes:
    """Return a file's bytes. Raises InputError, whose message asks for what is ``wanted``."""
    try:
        return read_regular(path, MAX_BYTES)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}. Give {wanted}.") from error


def rows_of(
    path: Path, content: bytes, columns: Columns, *, what: str, halves: bool = False
) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a file's ``content``, read by the ending of its name; ``what`` they are is for messages."""
    suffix = path.suffix.lower()
    text = decode_text(content, str(path))
    if suffix in TABLE_SUFFIXES:
        yield from table_rows(path, text, columns)
    elif suffix in JSON_SUFFIXES:
        yield from json_rows(path, text, lines_first=suffix in JSONL_SUFFIXES, halves=halves)
    else:
        raise InputError(f"{path}: unknown file type. Give {what} as a .json, .jsonl, .csv, .tsv or .txt file.")


def json_rows(path: Path, text: str, *, lines_first: bool, halves: bool = False) -> Iterator[tuple[str, Any]]:
    """Yield the rows of JSON text with their places: a list, JSON Lines, or a table as pandas writes it.

    A file's name does not tell JSON from JSON Lines: ``lines_first`` says which is likelier, the content decides.
    ``halves`` lets lone surrogates pass, as answers that were cut off hold them.

    Raises: InputError for text that is neither, a key that comes twice in one object, and columns of unequal length.
    """
    lines = [(number, line) for number, line in enumerate(re.split(r"\r\n|\n|\r", text), 1) if line.strip()]
    if lines_first and not lines:
        return
    try:
        found = parse_json(text, rows=True, halves=halves)
    except ValueError as error:
        if not lines_first and not _is_object(lines):
            raise InputError(f"{path} is not valid JSON ({error}).{_advice(text)}") from error
        found = None
    if found is None:
        for number, line in lines:
            yield f"{path}, line {number}", _json(line, f"{path}, line {number}", halves=halves)
        return
    for number, row in enumerate(_listed(found, path), 1):
        yield f"{path}, line {lines[0][0]}" if row is found and lines_first else f"{path}, row {number}", row


def is_nothing(value: Any) -> bool:
    """Say whether a value stands for none: null, NaN, a blank text, or a list of such values."""
    if isinstance(value, list):
        return all(map(is_nothing, value))
    return value is None or value != value or (isinstance(value, str) and not cleaned(value))


def image_name(value: Any, where: str) -> str:
    """Return the name of the image that a row's value stands for: a text, or an object with ``path`` or ``url``.

    Raises: InputError for another value, an address, and an image whose bytes are in the row.
    """
    name = next((value[key] for key in ("path", "url") if value.get(key)), None) if isinstance(value, dict) else value
    if isinstance(name, str) and name.startswith(REMOTE):
        raise InputError(f"{where}: the image is {name[:40]!r}…, not a file. Save it and give the file's name.")
    if isinstance(name, str) and name:
        return name
    if isinstance(value, dict) and value.get("bytes"):
        raise InputError(
            f"{where}: the row holds the image's bytes, not a file name. Save the image and give the file's name."
        )
    raise InputError(f"{where}: the image is {str(value)[:80]!r}. Give the name of an image file.")


def image_file(name: str, folders: Sequence[Path], where: str) -> Path:
    """Return the file that a row's image name leads to, in the first folder that has it.

    A name that no folder has is looked up as other systems write it: without surrounding blanks and quotes, with
    ``/`` for a backslash, with its %-signs decoded, with its accents in one character or two.

    Raises InputError when none has it.
    """
    try:
        for spelling in _spellings(name):
            for folder in folders:
                if (folder / spelling).is_file():
                    return folder / spelling
    except (OSError, ValueError) as error:  # a name that is too long, or holds a NUL
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{where}: image {name[:80]}… cannot be looked up: {reason}. Correct its name.") from error
    looked = " and ".join(str(folder) for folder in folders)
    advice = "Give its folder with --images."
    if WINDOWS_ROOT.match(cleaned(name)):
        advice = "It is an absolute Windows path: write it relative to a folder, and give that folder with --images."
    raise InputError(f"{where}: image {name} is missing (looked in {looked}). {advice}")


def _spellings(name: str) -> Iterator[str]:
    """Yield a name as it stands, then as it may be meant."""
    yield name
    plain = list(dict.fromkeys((name, cleaned(name))))
    slashes = plain + [each.replace("\\", "/") for each in plain]
    decoded = slashes + [unquote(each.removeprefix("file://")) for each in slashes]
    forms = decoded + [unicodedata.normalize(form, each) for form in ("NFC", "NFD") for each in decoded]
    yield from dict.fromkeys(each for each in forms if each)


# -- JSON -------------------------------------------------------------------------------------------------


def _is_object(lines: Sequence[tuple[int, str]]) -> bool:
    """Say whether the first line is a JSON object by itself, as in JSON Lines."""
    try:
        return bool(lines) and isinstance(parse_json(lines[0][1], rows=True), dict)
    except ValueError:
        return False


def _json(text: str, where: str, *, halves: bool) -> Any:
    try:
        return parse_json(text, rows=True, halves=halves)
    except ValueError as error:
        raise InputError(f"{where} is not valid JSON ({error}).{_advice(text)}") from error


def _advice(text: str) -> str:
    """Return what to do about commas that JSON does not allow."""
    if text.rstrip().endswith("},"):
        return " The line ends with a comma: remove it."
    return " There is a comma before a closing bracket: remove it." if re.search(r",\s*[\]}]", text) else ""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object. Raises: ValueError for a key that comes twice, of which only one can be meant."""
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {repeated[:40]!r} appears twice in one object")
    return found


def _listed(found: Any, path: Path) -> list[Any]:
    """Return the rows that a JSON value holds: a list, one of pandas' ``orient``s, or one row alone."""
    if isinstance(found, list):
        return found
    if not isinstance(found, dict) or not found:
        raise InputError(f"{path} must hold a list of rows, not {type(found).__name__}.")
    names, data = found.get("columns"), found.get("data")
    if isinstance(data, list) and isinstance(names, list):  # split
        if not all(isinstance(row, list) and len(row) == len(names) for row in data):
            raise InputError(f"{path}: each list in 'data' needs {len(names)} values, one for each of 'columns'.")
        return [_row(zip(map(str, names), row, strict=True), path) for row in data]
    if isinstance(data, list) and isinstance(found.get("schema"), dict):  # table
        return data
    turns = [each for name in CONVERSATION if isinstance(found.get(name), list) for each in found[name]]
    one_row = any(isinstance(each, dict) for each in turns)  # and not a column of conversations
    if all(isinstance(each, list) for each in found.values()) and not one_row:
        return _from_columns({name: dict(enumerate(values)) for name, values in found.items()}, path)
    if all(isinstance(each, dict) for each in found.values()):
        by_column = any(column_name(name) in ("image", "query", *CONVERSATION) for name in found)
        return _from_columns(found, path) if by_column else list(found.values())
    return [found]


def _from_columns(columns: Mapping[str, Mapping[Any, Any]], path: Path) -> list[dict[str, Any]]:
    """Return rows of what is stored by column; InputError when columns do not have the same rows."""
    first = next(iter(columns))
    for name, values in columns.items():
        if values.keys() != columns[first].keys():
            raise InputError(
                f"{path}: columns '{name}' ({len(values)} rows) and '{first}' ({len(columns[first])}) do not have the "
                "same rows. Write the file again as a list of rows."
            )
    return [{name: values[key] for name, values in columns.items()} for key in columns[first]]


def _row(pairs: Any, path: Path) -> dict[str, Any]:
    try:
        return _object(list(pairs))
    except ValueError as error:
        raise InputError(f"{path}: {error}.") from error
