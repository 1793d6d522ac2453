"""Small files: read a JSON object, say what is wrong with one, and write a file in one step."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.draft import PARTIAL, remove_abandoned
from models.errors import CheckpointError
from models.storage import storing

if TYPE_CHECKING:
    from pydantic import ValidationError

__all__ = ["MAX_JSON_BYTES", "first_problem", "read_json_object", "replace_file"]

MAX_JSON_BYTES = 100_000_000
"""More than any index or config of a real checkpoint (the largest, a 62-layer index, is under 1 MB)."""


def read_json_object(path: Path, *, needed_for: str) -> dict[str, Any]:
    """Return the JSON object in ``path``.

    Errors: CheckpointError when the file is missing, unreadable, too large, not JSON or not an object.
    """
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(
                f"{path}: {size:,} bytes, but {needed_for} may have {MAX_JSON_BYTES:,} at most. "
                "Replace the file by the one that was published with the checkpoint."
            )
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: there is no such file, and it is needed for {needed_for}. "
            "Give the folder of a complete checkpoint, or fetch the file again."
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}). Check the file's permissions.") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{path}: not UTF-8 text (byte {error.start}), so not {needed_for}. Fetch it again."
        ) from error
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}). Fetch the file again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path}: holds a JSON {type(value).__name__}, but {needed_for} is a JSON object. Fetch it again."
        )
    return value


def first_problem(error: ValidationError) -> str:
    """Return the first thing that is wrong with what was read: its field, what was given, how many more follow."""
    found = error.errors(include_url=False, include_context=False)[0]
    field = ".".join(map(str, found["loc"])) or "the whole"
    reason = str(found["msg"]).removeprefix("Value error, ")
    if not isinstance(found["input"], Mapping):  # of a missing field it is what the field is missing in
        reason += f" (given: {json.dumps(found['input'], default=str)[:80]})"
    more = error.error_count() - 1
    return f"{field}: {reason} ({more} more problems follow)" if more else f"{field}: {reason}"


def replace_file(path: Path, content: bytes) -> None:
    """Give a file another content, all of it or none; it is on disk when this returns.

    Errors: StorageError; what was there before is unchanged then.
    """
    unfinished = path.with_name(f".{path.name}{PARTIAL}{os.getpid()}-{secrets.token_hex(3)}")
    with storing(path, kept="Nothing there was changed."):
        try:
            with unfinished.open("wb") as stream:
                with contextlib.suppress(OSError):  # a file system without locks
                    fcntl.flock(stream, fcntl.LOCK_EX)
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
                unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
        remove_abandoned(path)
