"""Labelled images from a file: HoliSafe-Bench's rows as JSON, or JSONL or a table with ``image`` and ``label``.

A wrong label makes a wrong threshold: a value that could mean two things is refused, with its place.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibration.labelled.rows import file_bytes, image_file, image_name, is_nothing, rows_of
from calibration.labelled.tables import Columns, cleaned, column_name, truth
from runtimes.guard.bundle import sha256_of
from safevlm.errors import InputError

__all__ = ["LabelledImage", "Labels", "content_of", "read_labels"]

LABEL_FIELDS = ("label", "image_safety_label")
COLUMNS = Columns(needed=(("image",), LABEL_FIELDS))
WHOLE = re.compile(r"\+?([0-9]{1,9})(?:[.,]0*)?")
"""A whole number as spreadsheets write it: ``1``, ``1.0``, ``1,0``."""


@dataclass(frozen=True, kw_only=True)
class LabelledImage:
    """An image file and its class, an index into the class list."""

    path: Path
    label: int


@dataclass(frozen=True, kw_only=True)
class Labels:
    """A labels file: its images, each content once, and what was left out and why."""

    images: tuple[LabelledImage, ...]
    sha256: str
    """SHA-256 of the labels file."""
    contradictory: tuple[str, ...] = ()
    """Images whose rows, or whose copies, disagree about the label: left out."""
    duplicates: int = 0
    """Files with the content of another one and the same label: used once."""


def read_labels(path: Path, classes: Sequence[str], images: Path | None = None) -> Labels:
    """Read labels; image paths are relative to ``images``, by default to the file's folder or its ``images/``.

    A label is a class's index or its name, in which case, blanks, ``-`` and ``_`` do not count. Several rows about one
    image become one.

    Raises InputError, with the row's number, for a label outside ``classes``, a missing field or image file,
    an empty or unreadable file.
    """
    content = file_bytes(path, "a JSON, JSONL or CSV file")
    folders = [images] if images is not None else [path.parent, path.parent / "images"]
    found: dict[Path, set[int]] = defaultdict(set)
    for where, stored in rows_of(path, content, COLUMNS, what="labels"):
        row = _by_column(stored, where)
        if is_nothing(row.get("image")):
            raise InputError(f"{where}: 'image' is missing. Give the name of an image file.")
        label = _label(row, classes, where)
        found[image_file(image_name(row["image"], where), folders, where).resolve()].add(label)
    if not found:
        raise InputError(f"{path} has no rows. Each needs 'image' and 'label'.")
    return _by_content(found, hashlib.sha256(content).hexdigest())


def content_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes. Raises OSError."""
    return sha256_of(path)


def _by_content(found: Mapping[Path, set[int]], sha256: str) -> Labels:
    """Bring files of the same content together."""
    same: dict[str, list[Path]] = defaultdict(list)
    try:
        for path in found:
            same[content_of(path)].append(path)
    except OSError as error:
        raise InputError(f"image {error.filename} cannot be read: {error.strerror}. Check its permissions.") from error
    images, contradictory, duplicates = [], [], 0
    for paths in same.values():
        labels = set().union(*(found[path] for path in paths))
        if len(labels) > 1:
            contradictory += [str(path) for path in paths]
            continue
        images.append(LabelledImage(path=paths[0], label=labels.pop()))
        duplicates += len(paths) - 1
    return Labels(images=tuple(images), sha256=sha256, contradictory=tuple(contradictory), duplicates=duplicates)


def _by_column(row: Any, where: str) -> dict[str, Any]:
    """Return a row's values by column name; InputError when two that are read have the same name."""
    found: dict[str, Any] = {}
    for key, value in row.items() if isinstance(row, dict) else ():
        name = column_name(key)
        if name in found and name in ("image", *LABEL_FIELDS):
            raise InputError(f"{where}: two columns are named '{name}'. Remove one of them.")
        found[name] = value
    return found


def _label(row: Mapping[str, Any], classes: Sequence[str], where: str) -> int:
    """Return the index of a row's class; where both label columns are filled they must agree."""
    stated = {field: row[field] for field in LABEL_FIELDS if not is_nothing(row.get(field))}
    if not stated:
        raise InputError(
            f"{where}: 'label' is missing. Give the index (0 to {len(classes) - 1}) or the name of a class."
        )
    found = {field: _index(value, classes, where) for field, value in stated.items()}
    if len(set(found.values())) > 1:
        said = " and ".join(f"'{field}' is {value!r}" for field, value in stated.items())
        raise InputError(f"{where}: {said}. These are two classes for one image. Remove one of the columns.")
    return next(iter(found.values()))


def _index(value: Any, classes: Sequence[str], where: str) -> int:
    """Return the index of the class that a value means; InputError when it means none, or two."""
    found: set[int] = set()
    number: float = -1
    if isinstance(value, str):
        text = cleaned(value)
        same = [index for index, name in enumerate(classes) if name.casefold() == text.casefold()]
        alike = [index for index, name in enumerate(classes) if column_name(name) == column_name(text)]
        found = set(same or alike)
        whole = WHOLE.fullmatch(text)  # int() takes more than it should, and fails on a digit such as '²'
        number = int(whole[1]) if whole else -1
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        number = value
    found |= {index for index in range(len(classes)) if index == number}
    if len(found) > 1:
        meant = " or ".join(f"{index} ({classes[index]})" for index in sorted(found))
        raise InputError(f"{where}: label {value!r} is ambiguous: class {meant}. Write it so that it means only one.")
    if not found:
        only_whether = truth(value) is not None
        raise InputError(
            f"{where}: label {value!r} is not among the guard's classes: 0 to {len(classes) - 1}, or one of "
            f"{', '.join(classes)}.{' It names no class: which harm, or safe?' if only_whether else ''}"
        )
    return found.pop()
