"""HoliSafe-Bench from a local folder in its published layout: ``holisafe_bench.json`` and ``images/``.

The data set is gated (huggingface.co/datasets/etri-vilab/holisafe-bench, CC-BY-NC-4.0): this project neither ships nor
fetches it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.runs.record import PAIR_TYPES, Row
from benchmarks.suites.image_files import find_image, is_plain
from benchmarks.suites.suite import Suite, without_contradictions
from runtimes.guard.bundle import sha256_of
from safevlm.checkpoint.guard_head import standard_classes
from safevlm.errors import InputError
from safevlm.files.json_file import parse_json
from safevlm.files.regular_file import read_regular
from safevlm.files.text_file import decode_text
from safevlm.images.image import open_image

__all__ = ["HOW_TO_GET_IT", "ROWS_FILE", "holisafe", "row_of"]

ROWS_FILE = "holisafe_bench.json"
HOW_TO_GET_IT = (
    "HoliSafe-Bench is gated: accept its terms at huggingface.co/datasets/etri-vilab/holisafe-bench, then "
    "`hf download etri-vilab/holisafe-bench --repo-type dataset --local-dir holisafe-bench`, and give that folder with "
    "--data."
)
SHOWN = 5
MAX_BYTES = 2**30


def holisafe(folder: Path) -> Suite:
    """Read the benchmark. Raises InputError for a folder, row or image that is not as published."""
    path = folder / ROWS_FILE
    rows = [row_of(raw, f"{path}, row {number}") for number, raw in enumerate(_read(path), 1)]
    _refuse_repeats(rows, path)
    kept, left_out = without_contradictions(rows)
    images = sorted({row.image for row in rows if row.image is not None})
    files = _files(folder, images)
    return Suite(
        name="holisafe",
        rows=kept,
        pictures={name: partial(open_image, files[name]) for name in images},
        fingerprints={name: sha256_of(files[name]) for name in images},
        classes=standard_classes(),
        left_out=left_out,
    )


def row_of(raw: Any, where: str, *, query_needed: bool = True) -> Row:
    """Return one of the benchmark's rows. Raises InputError with ``where`` and the field's name."""
    if not isinstance(raw, Mapping):
        raise InputError(f"{where}: a row must be a JSON object, not {type(raw).__name__}.")
    wanted: Mapping[str, tuple[type, ...]] = {
        "id": (int, str),
        "image": (str,),
        "type": (str,),
        "category": (str,),
        "subcategory": (str,),
        "image_safety_label": (int,),
        "image_safe": (bool,),
    } | ({"query": (str,)} if query_needed or "query" in raw else {})
    for field, types in wanted.items():
        if field not in raw:
            raise InputError(f"{where}: field {field!r} is missing. It has {', '.join(map(str, raw))}.")
        value = raw[field]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            names = " or ".join(each.__name__ for each in types)
            raise InputError(f"{where}: field {field!r} is {value!r}; it must be {names}.")
    if raw["id"] == "":
        raise InputError(f"{where}: field 'id' is empty. Give each row an id of its own.")
    label, classes = int(raw["image_safety_label"]), standard_classes()
    if raw["type"] not in PAIR_TYPES:
        raise InputError(f"{where}: field 'type' is {raw['type']!r}. Allowed: {', '.join(PAIR_TYPES)}.")
    if not 0 <= label < len(classes):
        raise InputError(f"{where}: field 'image_safety_label' is {label}. Allowed: 0 to {len(classes) - 1}.")
    if raw["image_safe"] != (label == 0):
        raise InputError(f"{where}: field 'image_safe' is {raw['image_safe']}, but image_safety_label is {label}.")
    return Row(
        id=str(raw["id"]),
        kind="pair",
        image=_plain(str(raw["image"]), where),
        query=raw.get("query"),
        type=raw["type"],
        category=raw["category"],
        subcategory=raw["subcategory"],
        label=label,
    )


def _plain(name: str, where: str) -> str:
    if not is_plain(name):
        raise InputError(f"{where}: field 'image' is {name!r}; it must be a relative path inside images/.")
    return name


def _read(path: Path) -> Sequence[Any]:
    try:
        text = decode_text(read_regular(path, MAX_BYTES), str(path))
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file. {HOW_TO_GET_IT}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}).") from error
    try:
        rows = parse_json(text, rows=True, halves=True)
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}). {HOW_TO_GET_IT}") from error
    if not isinstance(rows, list):
        raise InputError(f"{path} must hold a JSON list of rows, not {type(rows).__name__}.")
    return rows


def _refuse_repeats(rows: Sequence[Row], path: Path) -> None:
    seen: dict[str, int] = {}
    for number, row in enumerate(rows, 1):
        if row.id in seen:
            raise InputError(f"{path}, row {number}: id {row.id} is already in row {seen[row.id]}.")
        seen[row.id] = number


def _files(folder: Path, images: Sequence[str]) -> dict[str, Path]:
    """Return where each image lies. Raises InputError that names some that are missing."""
    found = {name: find_image(folder, name) for name in images}
    missing = [name for name, file in found.items() if file is None]
    if missing:
        shown = ", ".join(missing[:SHOWN]) + (f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else "")
        raise InputError(f"{folder}: {len(missing)} of {len(images)} images are missing: {shown}. {HOW_TO_GET_IT}")
    return {name: file for name, file in found.items() if file is not None}
