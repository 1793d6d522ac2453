"""Read a short settings file that a person wrote, TOML or JSON by its ending."""

from __future__ import annotations

import errno
from importlib import import_module
from pathlib import Path
from typing import Any

from safevlm.errors import InputError
from safevlm.files.json_file import parse_json
from safevlm.files.regular_file import read_regular
from safevlm.files.text_file import decode_text

__all__ = ["read_table"]

MAX_BYTES = 2**20


def read_table(path: Path, what: str) -> Any:
    """Return what the file holds; ``what`` names it in messages, such as ``policy``. TOML needs Python 3.11 or later.

    Raises InputError for another ending, a file that cannot be read, is over 1 MiB, not UTF-8 or not parsable.
    """
    ending = path.suffix.lower()
    text = _text(path, what)
    if ending not in (".json", ".toml"):
        raise InputError(f"{path}: the name of a {what} file must end in .toml or .json. Rename it.")
    try:
        return parse_json(text) if ending == ".json" else import_module("tomllib").loads(text)
    except ModuleNotFoundError as error:
        raise InputError(f"{path}: reading TOML needs Python 3.11 or later. Write the {what} as JSON.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be parsed ({error}).") from error


def _text(path: Path, what: str) -> str:
    try:
        content = read_regular(path, MAX_BYTES)
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise InputError(f"{path} is larger than {MAX_BYTES} bytes; a {what} has only a few lines.") from error
        raise InputError(
            f"the {what} {path} cannot be read: {error.strerror or error}. Give a TOML or JSON file."
        ) from error
    return decode_text(content, str(path))
