"""Small files: read JSON that means one thing, say what is wrong with it, and write a file in one step."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ValidationError, ValidatorFunctionWrapHandler, WrapValidator
from pydantic_core import PydanticSerializationError

from safevlm.errors import CheckpointError
from safevlm.files.draft import PARTIAL, remove_abandoned
from safevlm.files.regular_file import read_regular
from safevlm.files.storage import storing
from safevlm.terminal.printable import shortened

__all__ = [
    "MAX_JSON_BYTES",
    "Text",
    "dump_json",
    "first_problem",
    "parse_json",
    "read_json_object",
    "replace_file",
    "validate_json",
    "without_halves",
]

MAX_JSON_BYTES = 64 * 2**20
"""More than any index or config of a real checkpoint (the largest, a 62-layer index, is under 1 MB)."""
MAX_ITEMS = 4_000_000
"""Maximum number of items in all lists and objects together: bounds the memory for a text of :data:`MAX_JSON_BYTES`."""
MAX_DEPTH = 100
MAX_DIGITS = 100
"""Maximum digits of a number; ``model_max_length`` of many tokenizers has 31."""

Model = TypeVar("Model", bound=BaseModel)
HALF = re.compile("[\ud800-\udfff]")
"""Half of a surrogate pair, as a text that was cut in the middle of an emoji ends: no encoding can hold it."""
QUOTED = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"')


def _any_text(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    return value if isinstance(value, str) and HALF.search(value) else handler(value)


Text = Annotated[str, WrapValidator(_any_text)]
"""Any text that a model or server may give: lone surrogates, which pydantic refuses in a ``str``, included."""


def parse_json(content: str | bytes, *, rows: bool = False, halves: bool = False) -> Any:
    """Return what a JSON text says, if it says one thing only.

    ``rows`` are those of a data set or a log: their number is not bounded, and NaN and Infinity pass, as Python's
    own writer puts them there. ``halves`` lets lone surrogates pass.

    Refused in addition to invalid JSON: a key that appears twice (readers differ in which they take), NaN and Infinity,
    numbers beyond a float or of more than 100 digits, lone surrogates, lists and objects within each other more than
    100 deep or of more than 4,000,000 items.

    Raises:
        ValueError: What is wrong, in one line.
    """
    text = content if isinstance(content, str) else _decoded(content)
    if not rows and _items(text) > MAX_ITEMS:
        raise ValueError(f"more than {MAX_ITEMS:,} items")
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique_keys,
            parse_constant=float if rows else _no_constant,
            parse_int=_integer,
            parse_float=_fraction,
        )
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} deep") from None
    _check_depth(value)
    if not halves and _holds_halves(value, text):
        raise ValueError("a string holds half of a surrogate pair")
    return value


def validate_json(kind: type[Model], content: str | bytes, *, halves: bool = False) -> Model:
    """Return an object of ``kind`` from a JSON text that means one thing; no value is converted to another type.

    ``halves`` lets lone surrogates pass in fields that are :data:`Text`.

    Raises:
        ValueError: What :func:`parse_json` refuses, or, as a ``ValidationError``, what does not fit ``kind``;
            :func:`first_problem` puts either into a line.
    """
    value = parse_json(content, halves=halves)
    text = content if isinstance(content, str) else _decoded(content)
    if not _holds_halves(value, text):
        return kind.model_validate_json(text, strict=True)
    # pydantic's own parser refuses the halves. Types are checked strictly without them; then nothing can be converted.
    kind.model_validate_json(without_halves(json.dumps(value, ensure_ascii=False)), strict=True)
    return kind.model_validate(value)


def dump_json(model: BaseModel, *, indent: int | None = None) -> bytes:
    """Return a model as JSON in UTF-8, without fields that are None; :func:`validate_json` gives it back.

    A text that holds half of a surrogate pair is escaped (``\\ud83d``), and with it all other signs beyond ASCII.
    """
    try:
        return model.model_dump_json(indent=indent, exclude_none=True).encode()
    except PydanticSerializationError:
        return json.dumps(model.model_dump(exclude_none=True), indent=indent, allow_nan=False).encode("ascii")


def without_halves(text: str) -> str:
    """Return text that every encoding can hold: U+FFFD for each half of a surrogate pair."""
    return HALF.sub("\ufffd", text)


def _holds_halves(value: Any, text: str) -> bool:
    """Say whether a string in ``value``, which is what the JSON ``text`` says, holds half of a surrogate pair."""
    if "\\ud" in text or "\\uD" in text or HALF.search(text):
        return HALF.search(json.dumps(value, ensure_ascii=False)) is not None
    return False


def _items(text: str) -> int:
    """Return how many items a JSON text has at most; signs inside strings count only where there are few."""
    count = sum(map(text.count, "[{,"))
    return count if count <= MAX_ITEMS else sum(map(QUOTED.sub("", text).count, "[{,"))


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text, at byte {error.start}") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key '{shortened(twice)}' appears twice in one object")
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number that JSON allows")


def _integer(digits: str) -> int | float:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits, {MAX_DIGITS} are allowed")
    return -0.0 if digits == "-0" else int(digits)


def _fraction(digits: str) -> float:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits, {MAX_DIGITS} are allowed")
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits} is out of range")
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            item
            for node in level
            if isinstance(node, (dict, list))
            for item in (node.values() if isinstance(node, dict) else node)
            if isinstance(item, (dict, list))
        ]
        if not level:
            return
    raise ValueError(f"nested more than {MAX_DEPTH} deep")


def read_json_object(path: Path, *, needed_for: str) -> dict[str, Any]:
    """Return the JSON object in ``path``.

    Raises CheckpointError when the file is missing, unreadable, no regular file, too large, or not JSON that
    :func:`parse_json` takes, or not an object.
    """
    try:
        content = read_regular(path, MAX_JSON_BYTES)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing; it is needed for {needed_for}. Give the folder of a complete checkpoint, or fetch "
            "the file again."
        ) from None
    except OSError as error:
        advice = "Check the file and its permissions."
        if error.errno == errno.EFBIG:
            advice = "Replace it with the file that was published with the checkpoint."
        raise CheckpointError(f"{path}: cannot be read as {needed_for} ({error.strerror}). {advice}") from error
    try:
        value = parse_json(content)
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}). Fetch the file again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path}: {needed_for} must be a JSON object, not {type(value).__name__}. Fetch it again."
        )
    return value


def first_problem(error: ValueError, *, secret: bool = False) -> str:
    """Return the first thing that is wrong with what was read: its field, what was given, how many more follow.

    Of what is ``secret`` nothing that was given is repeated.
    """
    if not isinstance(error, ValidationError):  # no JSON at all, or not JSON that means one thing
        return f"not valid JSON ({error})"
    found = error.errors(include_url=False, include_context=False)[0]
    field = ".".join(shortened(str(part)) for part in found["loc"]) or "the whole"
    reason = str(found["msg"]).removeprefix("Value error, ")
    if not secret and not isinstance(found["input"], Mapping):  # of a missing field it is what the field is missing in
        reason += f" (given: {json.dumps(found['input'], default=str)[:80]})"
    more = error.error_count() - 1
    return f"{field}: {reason} (and {more} more problems)" if more else f"{field}: {reason}"


def replace_file(path: Path, content: bytes, *, mode: int | None = None) -> None:
    """Give a file another content, all of it or none; it is on disk when this returns.

    ``mode`` are its permissions from its first byte on, by default those of any new file.

    Raises StorageError; what was there before is unchanged then.
    """
    unfinished = path.with_name(f".{path.name}{PARTIAL}{os.getpid()}-{secrets.token_hex(3)}")
    with storing(path, kept="Nothing there was changed."):
        try:
            with unfinished.open("wb") as stream:
                if mode is not None:
                    os.fchmod(stream.fileno(), mode)
                with contextlib.suppress(OSError):  # a file system without locks
                    fcntl.flock(stream, fcntl.LOCK_EX)
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
                unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
        remove_abandoned(path)
