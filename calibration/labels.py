"""Labelled images from a file: HoliSafe-Bench's rows as JSON, or JSONL or CSV with ``image`` and ``label``."""

from __future__ import annotations

import csv
import hashlib
import io
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibration.rows import decoded, file_bytes, image_file, json_rows
from models.errors import InputError
from runtimes.bundle import sha256_of

__all__ = ["LabelledImage", "Labels", "content_of", "read_labels"]

LABEL_FIELDS = ("label", "image_safety_label")
SHOWN = 5


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
    """Of the labels file's bytes."""
    contradictory: tuple[str, ...] = ()
    """Images whose rows, or whose copies, disagree about the label: left out."""
    duplicates: int = 0
    """Files with the content of another one and the same label: used once."""


def read_labels(path: Path, classes: Sequence[str], images: Path | None = None) -> Labels:
    """Read labels; image paths are relative to ``images``, else to the file's folder or its ``images/``.

    A label is a class's index or its name. Several rows about one image become one.

    Errors: InputError, with the row's number, for a label outside ``classes``, a missing field or image file,
    an empty or unreadable file.
    """
    content = file_bytes(path, "a JSON, JSONL or CSV file")
    folders = [images] if images is not None else [path.parent, path.parent / "images"]
    found: dict[Path, set[int]] = defaultdict(set)
    for where, row in _rows(path, content):
        if not isinstance(row, dict) or not isinstance(row.get("image"), str) or not row["image"]:
            raise InputError(f"{where}: 'image' is missing, which names an image file.")
        label = _label(row, classes, where)
        found[image_file(row["image"], folders, where).resolve()].add(label)
    if not found:
        raise InputError(f"{path} has no rows. Each needs 'image' and 'label'.")
    return _by_content(found, hashlib.sha256(content).hexdigest())


def content_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes. Errors: OSError."""
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


def _rows(path: Path, content: bytes) -> Iterator[tuple[str, Any]]:
    """Yield each row with its place in the file."""
    text = decoded(path, content)
    if path.suffix.lower() == ".csv":
        yield from _csv(path, text)
    else:
        yield from json_rows(path, text, "labels are read from .json, .jsonl and .csv files")


def _csv(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        if text.strip() and "image" not in (reader.fieldnames or ()):
            raise InputError(f"{path}, line 1: the first line of a CSV file names its columns, 'image' and 'label'.")
        for row in reader:
            yield f"{path}, line {reader.line_num}", row
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num} is not valid CSV ({error}).") from error


def _label(row: Mapping[str, Any], classes: Sequence[str], where: str) -> int:
    field = next((name for name in LABEL_FIELDS if row.get(name) not in (None, "")), None)
    if field is None:
        raise InputError(f"{where}: 'label' is missing: a class's index (0 to {len(classes) - 1}) or name.")
    value = row[field]
    names = {name.lower(): index for index, name in enumerate(classes)}
    if isinstance(value, str):
        # looked up as text: int() takes more than it should, and fails on a digit such as '²'
        names = {str(index): index for index in range(len(classes))} | names
        index = names.get(value.strip().lower())
    else:
        index = value if isinstance(value, int) and not isinstance(value, bool) else None
    if index is None or not 0 <= index < len(classes):
        raise InputError(
            f"{where}: label {value!r} is not among the guard's classes: 0 to {len(classes) - 1}, or one of "
            f"{', '.join(classes)}."
        )
    return index
