"""The types that ``manifest.json`` and ``gguf.json`` are made of, each with its bounds.

Bounds are far above what any export writes: they keep a hostile manifest from costing memory or time, and what is
shown of one readable.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from safevlm.contract.class_names import MAX_CLASSES, class_names_problem
from safevlm.terminal.printable import is_plain, shortened

__all__ = [
    "Batch",
    "BelowOne",
    "BundlePath",
    "Classes",
    "Count",
    "Frozen",
    "Milliseconds",
    "Name",
    "Positive",
    "Probability",
    "Sha256",
    "ViewMode",
    "Width",
    "unique",
]

ViewMode: TypeAlias = Literal["tiles", "judged", "whole"]
"""How large images are judged and shown: see ``runtimes.images.tiling``."""

MAX_PATH = 255
MAX_NAME = 200
MAX_TEXT = 10_000
MAX_FILE = 2**50
"""Bytes of a file, and any other count."""
MAX_WIDTH = 2**24
"""Features of a layer, tokens, and any other side of a tensor."""
MAX_BATCH = 4_096
DAY_MS = 86_400_000


def _inside(path: str) -> str:
    """Return ``path`` if it is relative, normal and stays in its folder."""
    pure = PurePosixPath(path)
    normal = not pure.is_absolute() and ".." not in pure.parts and str(pure) == path and path != "."
    if not normal or "\\" in path or ":" in path or not is_plain(path) or len(path) > MAX_PATH:
        raise ValueError(
            f"path '{shortened(path)}' is not a plain relative path inside the bundle, such as 'guard.fp32.onnx', of "
            f"at most {MAX_PATH} characters"
        )
    return path


def _name(name: str) -> str:
    if not 0 < len(name) <= MAX_NAME or not is_plain(name):
        raise ValueError(f"'{shortened(name)}': 1 to {MAX_NAME} visible characters are allowed")
    return name


def _classes(names: tuple[str, ...]) -> tuple[str, ...]:
    problem = class_names_problem(names)
    if problem is not None:
        raise ValueError(problem)
    return names


def unique(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return names of which none appears twice; ValueError otherwise."""
    twice = {name for name in names if names.count(name) > 1} if len(set(names)) != len(names) else set()
    if twice:
        raise ValueError(f"a name appears twice: {', '.join(map(shortened, sorted(twice)))}")
    return names


Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
BundlePath = Annotated[str, AfterValidator(_inside)]
Name = Annotated[str, AfterValidator(_name)]
Classes = Annotated[tuple[str, ...], Field(min_length=2, max_length=MAX_CLASSES), AfterValidator(_classes)]
Probability = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=0, le=MAX_FILE)]
Positive = Annotated[int, Field(gt=0, le=MAX_FILE)]
Width = Annotated[int, Field(gt=0, le=MAX_WIDTH)]
Batch = Annotated[int, Field(gt=0, le=MAX_BATCH)]
Milliseconds = Annotated[float, Field(ge=0, le=DAY_MS)]


class Frozen(BaseModel):
    """A part of a manifest: unknown keys, NaN, infinities and texts of more than 10,000 characters are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, str_max_length=MAX_TEXT)
