"""The safetensors files of one checkpoint: which tensor lies in which file, and headers that can be believed.

File format: https://huggingface.co/docs/safetensors (8 bytes little-endian header length, JSON header, data).
A header is believed only when it accounts for every byte of its file. No file of another format is ever opened.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from models.errors import CheckpointError
from models.json_file import parse_json, read_json_object
from models.printable import shortened
from models.regular_file import open_regular

__all__ = ["MAX_HEADER_BYTES", "Shards", "TensorEntry", "read_header"]

MAX_HEADER_BYTES = 32 * 2**20
"""The header of 3,000 tensors has half a megabyte. The format itself allows 100 MB."""
MAX_NAME = 1_024
"""Characters of a tensor's name."""
MAX_DIMENSIONS = 16
MAX_SIZE = 2**62
"""Of a side, an offset, or a tensor in bits: far above any file, and no overflow in another reader."""

INDEX_SUFFIX = ".safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
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

    Errors: CheckpointError when the file is no regular one or cut short, or its header is too long, not JSON, or says
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
        header = parse_json(raw.decode("utf-8"))
        if not raw.startswith(b"{"):
            raise ValueError("it does not begin with '{'")
    except ValueError as error:
        raise CheckpointError(f"{path}: its header is not valid JSON ({error}). {FETCH_AGAIN}") from error
    if not isinstance(header, dict):
        raise CheckpointError(
            f"{path}: its header is a JSON {type(header).__name__}, an object is allowed. {FETCH_AGAIN}"
        )
    return header, 8 + length, size


def _check_metadata(path: Path, metadata: Any) -> None:
    texts = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    if metadata is not None and not texts:
        raise CheckpointError(f"{path}: its header's '__metadata__' is not an object of texts. {FETCH_AGAIN}")


def _entry(path: Path, name: str, raw: Any, data_start: int) -> TensorEntry:
    """Turn one header item into an entry whose dtype, shape and offsets agree with each other."""

    def lie(what: str) -> CheckpointError:
        return CheckpointError(f"{path}: its header lies about tensor '{shortened(name)}': {what}. {FETCH_AGAIN}")

    if len(name) > MAX_NAME:
        raise lie(f"a name of {len(name):,} characters, {MAX_NAME:,} are allowed")
    if not isinstance(raw, dict) or raw.keys() != {"dtype", "shape", "data_offsets"}:
        raise lie("an object with dtype, shape and data_offsets, and nothing else, is needed")
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
                f"{path}: its header lies about tensor '{shortened(name)}': beginning at byte {entry.start:,} it "
                f"{wrong} (byte {at:,} is the next free one). {FETCH_AGAIN}"
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
    ) -> None:
        """Find the shards of a checkpoint named ``where``, whose top level holds ``files``.

        ``folder`` holds at least the JSON ones; ``exists`` knows every file, also below the top level.
        Errors: CheckpointError when there are none, only pickles, or an index that cannot be used.
        """
        self.where = where
        self._path_of = path_of
        self._paths: dict[str, Path] = {}
        self._headers: dict[str, dict[str, TensorEntry]] = {}
        self.index = _find_index(where, files)
        if self.index is not None:
            self.stored: dict[str, str] = _read_index(folder / self.index, where, exists)
        else:
            self.stored = {}
            for shard in _find_shards(where, files):
                for name in self.header(shard):
                    self._place(name, shard)

    @classmethod
    def local(cls, folder: Path) -> Shards:
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


def _find_index(where: str, files: Collection[str]) -> str | None:
    indexes = sorted(name for name in files if name.endswith(INDEX_SUFFIX))
    if "model" + INDEX_SUFFIX in indexes:
        return "model" + INDEX_SUFFIX
    if len(indexes) > 1:
        raise CheckpointError(
            f"{where}: several indexes ({', '.join(indexes)}) and none is 'model{INDEX_SUFFIX}'. Keep one."
        )
    return indexes[0] if indexes else None


def _read_index(path: Path, where: str, exists: Callable[[str], bool]) -> dict[str, str]:
    """Return stored name -> shard of an index whose shards all exist and lie inside the folder."""
    placed = read_json_object(path, needed_for="a checkpoint's index").get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise CheckpointError(
            f"{path}: 'weight_map' must be a non-empty object, tensor name -> shard. Fetch the index again."
        )
    for name, shard in placed.items():
        if not isinstance(shard, str) or not _stays_inside(shard):
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


def _stays_inside(shard: str) -> bool:
    path = PurePosixPath(shard)
    relative = not path.is_absolute() and not PureWindowsPath(shard).anchor and "\\" not in shard
    return relative and ".." not in path.parts and shard.endswith(".safetensors") and str(path) == shard


def _find_shards(where: str, files: Collection[str]) -> list[str]:
    """Return the shards of a checkpoint without index: ``model.safetensors``, else every file of the kind."""
    found = sorted(name for name in files if name.endswith(".safetensors"))
    if "model.safetensors" in found:
        return ["model.safetensors"]
    if not found:
        raise _no_safetensors(where, files)
    for name in found:
        numbered = re.fullmatch(r"(.+-)(\d+)(-of-)(\d+)(\.safetensors)", name)
        if numbered is None:
            continue
        stem, number, of, total, suffix = numbered.groups()
        for other in range(1, min(int(total), 10_000) + 1):
            expected = f"{stem}{other:0{len(number)}}{of}{total}{suffix}"
            if expected not in found:
                raise CheckpointError(
                    f"{where}: shard '{expected}' is missing ('{name}' says there are {int(total)}). "
                    "Fetch it again into the same folder."
                )
    return found


def _no_safetensors(where: str, files: Collection[str]) -> CheckpointError:
    pickles = sorted(name for name in files if name.endswith(PICKLE_SUFFIXES))
    if pickles:
        return CheckpointError(
            f"{where}: its weights are stored as pickle only ({', '.join(pickles[:3])}). Loading a pickle runs "
            "whatever code its writer put in it, so these files are never opened; only .safetensors is allowed. "
            "Convert it where you trust it: load the state dict with torch.load(FILE, weights_only=True) and "
            "write it with safetensors.torch.save_file(state, 'model.safetensors'), then give that folder."
        )
    hint = ""
    if "manifest.json" in files:
        hint = " It looks like a guard bundle: pass it as --bundle where a command takes one."
    elif any(name.endswith(".gguf") for name in files):
        hint = " It holds GGUF files, which carry no guard head: give the checkpoint they were made from."
    return CheckpointError(
        f"{where}: no .safetensors file in it. A checkpoint is a folder with config.json and model.safetensors, "
        f"or shards with an index beside them.{hint}"
    )
