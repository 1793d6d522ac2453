"""The header of one safetensors file, read so that it can be believed.

File format: https://huggingface.co/docs/safetensors (8 bytes little-endian header length, JSON header, data).
A header is believed only when it accounts for every byte of its file. Own checks, stricter than those of the
safetensors library, because that one maps the whole file to check it, and its errors name neither file nor remedy;
tests hold that it takes whatever is taken here.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safevlm.errors import CheckpointError
from safevlm.files.json_file import parse_json
from safevlm.files.regular_file import open_regular
from safevlm.terminal.printable import shortened

__all__ = ["GIT_LFS_MARK", "MAX_HEADER_BYTES", "TensorEntry", "read_header"]

MAX_HEADER_BYTES = 32 * 2**20
"""The header of 3,000 tensors has half a megabyte. The format itself allows 100 MB."""
MAX_NAME = 1_024
"""Characters of a tensor's name."""
MAX_DIMENSIONS = 16
MAX_SIZE = 2**62
"""Largest side, offset, or tensor size in bits: far above any file, and without overflow in other readers."""

GIT_LFS_MARK = b"version https://git-lfs"

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
"""Bits an element of each safetensors dtype takes."""

FETCH_AGAIN = "Fetch this file again, or write the checkpoint again with safetensors."


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a shard; ``start`` and ``end`` are byte offsets from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Return the tensors of a safetensors file by stored name, reading its header only.

    Whatever is accepted here the safetensors library accepts, too.

    Raises CheckpointError when the file is no regular one or cut short, or its header is too long, not JSON, or says
    anything about dtype, shape or offsets that the file's size contradicts.
    """
    header, data_start, size = _load_header(path)
    _check_metadata(path, header.pop("__metadata__", None))
    entries = {name: _entry(path, name, raw, data_start) for name, raw in header.items()}
    _check_tiling(path, entries, data_start, size)
    return entries


def _load_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """Return the raw header object, the offset where data begins, and the file's size."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            first = file.read(8)
            if (first + file.read(len(GIT_LFS_MARK) - 8)).startswith(GIT_LFS_MARK):
                raise CheckpointError(
                    f"{path}: a Git LFS pointer, not the tensors themselves. Run `git lfs pull` in the folder."
                )
            length = int.from_bytes(first, "little")
            if size < 8:
                raise CheckpointError(f"{path}: truncated: {size} bytes, too short for a header. {FETCH_AGAIN}")
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path}: its first 8 bytes announce a header of {length:,} bytes; at most {MAX_HEADER_BYTES:,} "
                    f"are allowed. It is damaged, or not a safetensors file. {FETCH_AGAIN}"
                )
            if length > size - 8:
                raise CheckpointError(
                    f"{path}: truncated: a header of {length:,} bytes is announced, "
                    f"{size - 8:,} bytes follow. {FETCH_AGAIN}"
                )
            file.seek(8)
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}). Check the path and its rights.") from error
    try:
        header = parse_json(raw.decode("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: its header is not valid JSON ({error}). {FETCH_AGAIN}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: its header must be a JSON object, not {type(header).__name__}. {FETCH_AGAIN}")
    if not raw.startswith(b"{"):
        raise CheckpointError(f"{path}: its header must begin with '{{', not with white space. {FETCH_AGAIN}")
    return header, 8 + length, size


def _check_metadata(path: Path, metadata: Any) -> None:
    texts = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    if metadata is not None and not texts:
        raise CheckpointError(
            f"{path}: its header's '__metadata__' must be an object whose values are strings. {FETCH_AGAIN}"
        )


def _entry(path: Path, name: str, raw: Any, data_start: int) -> TensorEntry:
    """Turn one header item into an entry whose dtype, shape and offsets agree with each other."""

    def lie(what: str) -> CheckpointError:
        return CheckpointError(f"{path}: its header lies about tensor '{shortened(name)}': {what}. {FETCH_AGAIN}")

    if len(name) > MAX_NAME:
        raise lie(f"its name has {len(name):,} characters, at most {MAX_NAME:,} are allowed")
    if not isinstance(raw, dict) or raw.keys() != {"dtype", "shape", "data_offsets"}:
        raise lie("it must be an object with dtype, shape and data_offsets only")
    dtype, shape, offsets = raw["dtype"], raw["shape"], raw["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise lie(f"dtype {shortened(repr(dtype))} is unknown; known are {', '.join(BITS)}")
    if not _sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise lie(f"shape {shortened(repr(shape))} is not a list of at most {MAX_DIMENSIONS} sizes")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise lie(f"data_offsets {shortened(repr(offsets))} is not [begin, end]")
    bits = math.prod(shape) * BITS[dtype]
    if math.prod(size for size in shape if size) * BITS[dtype] > MAX_SIZE:  # also of a tensor with a side of 0
        raise lie(f"shape {shortened(repr(shape))} of {dtype} is larger than any file")
    if bits % 8 or bits // 8 != offsets[1] - offsets[0]:
        raise lie(
            f"shape {shape} of {dtype} takes {bits // 8:,} bytes, data_offsets {offsets} span "
            f"{offsets[1] - offsets[0]:,}"
        )
    return TensorEntry(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= MAX_SIZE for item in value)


def _check_tiling(path: Path, entries: Mapping[str, TensorEntry], data_start: int, size: int) -> None:
    """Require that the tensors lie one after another and fill the file, as the format demands."""
    at = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.end > size:
            raise CheckpointError(
                f"{path}: truncated: tensor '{shortened(name)}' ends at byte {entry.end:,}, the file has {size:,} "
                f"bytes. {FETCH_AGAIN}"
            )
        if entry.start != at:
            wrong = "overlaps the tensor before it" if entry.start < at else "leaves a gap before it"
            raise CheckpointError(
                f"{path}: its header lies about tensor '{shortened(name)}': it begins at byte {entry.start:,} and "
                f"{wrong} (the next free byte is {at:,}). {FETCH_AGAIN}"
            )
        at = entry.end
    if at != size:
        raise CheckpointError(
            f"{path}: {size - at:,} bytes follow the last tensor; a safetensors file must end with it. {FETCH_AGAIN}"
        )
