"""The safetensors files of one checkpoint: which tensor lies in which file, and headers that can be believed.

File format: https://huggingface.co/docs/safetensors (8 bytes little-endian header length, JSON header, data).
A header is believed only when it accounts for every byte of its file. No file of another format is ever opened.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.adapter import refuse_adapter_files, refuse_adapter_tensors
from models.errors import CheckpointError
from models.json_file import read_json_object
from models.weight_files import choose_weights, stays_inside

__all__ = ["MAX_HEADER_BYTES", "Shards", "TensorEntry", "read_header"]

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit on a header."""

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

    Errors: CheckpointError when the file is cut short, or its header is too long, not JSON, or says anything
    about dtype, shape or offsets that the file's size contradicts.
    """
    header, data_start, size = _load_header(path)
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, raw, data_start) for name, raw in header.items()}
    _check_tiling(path, entries, data_start, size)
    return entries


def _load_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """Return the raw header object, the offset where data begins, and the file's size."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            first = file.read(8)
            if (first + file.read(len(GIT_LFS_MARK) - 8)).startswith(GIT_LFS_MARK):
                raise CheckpointError(
                    f"{path}: a Git LFS pointer, not the tensors themselves. Run `git lfs pull` in the folder."
                )
            length = int.from_bytes(first, "little")
            if size < 8:
                raise CheckpointError(f"{path}: truncated, {size} bytes where a header begins. {FETCH_AGAIN}")
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path}: its first 8 bytes announce a header of {length:,} bytes; "
                    f"{MAX_HEADER_BYTES:,} are allowed. Not a safetensors file, or damaged. {FETCH_AGAIN}"
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
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its header is not valid JSON ({error}). {FETCH_AGAIN}") from error
    if not isinstance(header, dict):
        raise CheckpointError(
            f"{path}: its header is a JSON {type(header).__name__}, an object is allowed. {FETCH_AGAIN}"
        )
    return header, 8 + length, size


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"'{key}' stands in it twice")
        found[key] = value
    return found


def _entry(path: Path, name: str, raw: Any, data_start: int) -> TensorEntry:
    """Turn one header item into an entry whose dtype, shape and offsets agree with each other."""

    def lie(what: str) -> CheckpointError:
        return CheckpointError(f"{path}: its header lies about tensor '{name}': {what}. {FETCH_AGAIN}")

    if not isinstance(raw, dict) or not {"dtype", "shape", "data_offsets"} <= raw.keys():
        raise lie("an object with dtype, shape and data_offsets is needed")
    dtype, shape, offsets = raw["dtype"], raw["shape"], raw["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise lie(f"dtype {dtype!r} is unknown; known are {', '.join(BITS)}")
    if not _sizes(shape):
        raise lie(f"shape {shape!r} is not a list of sizes")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise lie(f"data_offsets {offsets!r} is not [begin, end]")
    bits = math.prod(shape) * BITS[dtype]
    if bits % 8 or bits // 8 != offsets[1] - offsets[0]:
        raise lie(
            f"shape {shape} of {dtype} takes {bits // 8:,} bytes, data_offsets {offsets} span "
            f"{offsets[1] - offsets[0]:,}"
        )
    return TensorEntry(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_tiling(path: Path, entries: Mapping[str, TensorEntry], data_start: int, size: int) -> None:
    """Require that the tensors lie one after another and fill the file, as the format demands."""
    at = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.end > size:
            raise CheckpointError(
                f"{path}: truncated: tensor '{name}' ends at byte {entry.end:,}, the file has {size:,} bytes. "
                f"{FETCH_AGAIN}"
            )
        if entry.start != at:
            wrong = "overlaps the tensor before it" if entry.start < at else "leaves a gap before it"
            raise CheckpointError(
                f"{path}: its header lies about tensor '{name}': beginning at byte {entry.start:,} it {wrong} "
                f"(byte {at:,} is the next free one). {FETCH_AGAIN}"
            )
        at = entry.end
    if at != size:
        raise CheckpointError(
            f"{path}: {size - at:,} bytes follow the last tensor that the header names; a safetensors file ends "
            f"with it. {FETCH_AGAIN}"
        )


class Shards:
    """The safetensors files of a checkpoint, with the place of every stored tensor name.

    With an index (``*.safetensors.index.json``) names are known before any shard is there, so ``path_of`` is
    asked for a shard only when one of its tensors is needed. Without one every shard's header is read at once.
    """

    def __init__(
        self,
        where: str,
        folder: Path,
        files: Collection[str],
        *,
        exists: Callable[[str], bool],
        path_of: Callable[[str], Path],
        stated: object = None,
    ) -> None:
        """Find the shards of a checkpoint named ``where``, whose top level holds ``files``.

        ``folder`` holds at least the JSON ones; ``exists`` knows every file, also below the top level; ``stated``
        is config.json's ``transformers_weights``.
        Errors: CheckpointError when there are none, only pickles, an index that cannot be used, or an adapter that
        is not merged.
        """
        refuse_adapter_files(where, files)
        self.where = where
        self._path_of = path_of
        self._paths: dict[str, Path] = {}
        self._headers: dict[str, dict[str, TensorEntry]] = {}
        chosen = choose_weights(where, files, stated=stated, exists=exists)
        self.index = chosen.index
        if self.index is not None:
            self.stored: dict[str, str] = _read_index(folder / self.index, where, exists)
        else:
            self.stored = {}
            for shard in chosen.shards:
                for name in self.header(shard):
                    self._place(name, shard)
        refuse_adapter_tensors(where, self.stored)
        self.ignored = chosen.ignored(files, set(self.stored.values()))
        """Weight files beside those that are read."""

    @classmethod
    def local(cls, folder: Path, stated: object = None) -> Shards:
        """Open a folder on disk, checking that every shard is there and that its header can be believed."""
        try:
            files = [path.name for path in folder.iterdir() if path.is_file()]
        except OSError as error:
            raise CheckpointError(
                f"{folder}: cannot be listed ({error.strerror}). Give a folder that you may read."
            ) from error
        shards = cls(
            str(folder),
            folder,
            files,
            exists=lambda shard: (folder / shard).is_file(),
            path_of=lambda shard: folder / shard,
            stated=stated,
        )
        for shard in sorted(set(shards.stored.values())):
            shards.header(shard)
        return shards

    def path(self, shard: str) -> Path:
        """Return where a shard lies on this machine, fetching it first if the checkpoint is a hub's."""
        if shard not in self._paths:
            self._paths[shard] = self._path_of(shard)
        return self._paths[shard]

    def header(self, shard: str) -> dict[str, TensorEntry]:
        """Return the entries of one shard, checked once against the index.

        Errors: CheckpointError for a damaged shard or one that disagrees with the index.
        """
        if shard not in self._headers:
            header = read_header(self.path(shard))
            if self.index is not None:
                self._check_against_index(shard, header)
            self._headers[shard] = header
        return self._headers[shard]

    def entry(self, stored_name: str) -> TensorEntry:
        """Return a tensor's entry, reading (for a hub: fetching) its shard's header on first use."""
        return self.header(self.stored[stored_name])[stored_name]

    def share(self, names: Collection[str]) -> float | None:
        """Return the stored ``names``' share of all tensor bytes, ``None`` while a shard is not on this machine."""
        if not set(self.stored.values()) <= self._headers.keys():
            return None
        total = sum(entry.nbytes for header in self._headers.values() for entry in header.values())
        return sum(self.entry(name).nbytes for name in names) / total if total else 0.0

    def _place(self, name: str, shard: str) -> None:
        other = self.stored.setdefault(name, shard)
        if other != shard:
            raise CheckpointError(
                f"{self.where}: tensor '{name}' stands in two shards, '{other}' and '{shard}'; one is allowed. "
                "Remove the file that does not belong to this checkpoint."
            )

    def _check_against_index(self, shard: str, header: Mapping[str, TensorEntry]) -> None:
        for name in header:
            if name not in self.stored:
                raise CheckpointError(
                    f"{self.where}: shard '{shard}' holds tensor '{name}', which '{self.index}' does not list. "
                    "Index and shards must be of one checkpoint: fetch both again, or write the index again."
                )
            self._place(name, shard)
        for name, place in self.stored.items():
            if place == shard and name not in header:
                raise CheckpointError(
                    f"{self.where}: '{self.index}' places tensor '{name}' in shard '{shard}', which lacks it. "
                    "Index and shards must be of one checkpoint: fetch both again."
                )


def _read_index(path: Path, where: str, exists: Callable[[str], bool]) -> dict[str, str]:
    """Return stored name -> shard of an index whose shards all exist and lie inside the folder."""
    placed = read_json_object(path, needed_for="a checkpoint's index").get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise CheckpointError(
            f"{path}: 'weight_map' must be a non-empty object, tensor name -> shard. Fetch the index again."
        )
    for name, shard in placed.items():
        if not isinstance(shard, str) or not stays_inside(shard):
            raise CheckpointError(
                f"{path}: tensor '{name}' is placed in {shard!r}; a path to a .safetensors file inside the folder "
                "is allowed. Do not use this checkpoint unless you know who wrote its index."
            )
    for shard in sorted(set(placed.values())):
        if not exists(shard):
            lost = sorted(name for name, place in placed.items() if place == shard)
            raise CheckpointError(
                f"{where}: shard '{shard}' is missing; '{path.name}' places {len(lost)} tensors in it, "
                f"'{lost[0]}' among them. Fetch it again into the same folder."
            )
    return placed
