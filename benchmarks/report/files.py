"""Writes the files of a page: all of them or none, and JSON that every reader takes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safevlm.files.draft import draft_of, publish
from safevlm.files.storage import storing

__all__ = ["not_numbers", "strict_json", "write_files"]


def write_files(out: Path, files: Mapping[str, bytes]) -> None:
    """Write files, by name, into the folder ``out``: a new one, or one where files of these names are replaced.

    Raises StorageError when ``out`` cannot be written; a full disk leaves nothing behind.
    """
    with draft_of(out) as draft, storing(out, advice="give another --out"):
        for name, data in files.items():
            (draft / name).write_bytes(data)
        if out.is_dir():
            for name in files:
                (draft / name).replace(out / name)
        else:
            publish(draft, out)


def strict_json(content: Any) -> bytes:
    """Return strict JSON: no NaN, and no half of a surrogate pair, which many readers refuse."""
    text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False, sort_keys=False)
    whole = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return whole.encode("utf-8") + b"\n"


def not_numbers(value: Any, name: str) -> Iterator[str]:
    """Yield the place, such as ``name.lines[0] (nan)``, of each figure in a JSON value that is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{name} ({value})"
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from not_numbers(each, f"{name}.{key}")
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        for place, each in enumerate(value):
            yield from not_numbers(each, f"{name}[{place}]")
