"""Read a small JSON object of a checkpoint folder, refusing anything else with a message that says where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from models.errors import CheckpointError

__all__ = ["MAX_JSON_BYTES", "read_json_object"]

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
