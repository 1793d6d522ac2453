"""Tensors of a checkpoint by canonical name, read one at a time.

torch is imported by ``read`` alone: names, shapes and hashes work without it.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safevlm.checkpoint.weights.shard_header import TensorEntry
from safevlm.checkpoint.weights.shards import Shards
from safevlm.errors import CheckpointError
from safevlm.files.regular_file import open_regular, require_regular

if TYPE_CHECKING:
    import torch

__all__ = ["TensorStore"]

CHUNK_BYTES = 4 << 20


class TensorStore:
    """Reads tensors of one or several safetensors files lazily, by canonical name.

    A stored name that ``canonical`` does not know keeps its stored name.
    """

    def __init__(self, shards: Shards, canonical: Callable[[str], str | None]) -> None:
        """Name every tensor of ``shards``.

        Raises CheckpointError when two stored names have the same canonical one.
        """
        self._shards = shards
        self._stored: dict[str, str] = {}
        for stored in sorted(shards.stored):
            name = canonical(stored) or stored
            other = self._stored.setdefault(name, stored)
            if other != stored:
                raise CheckpointError(
                    f"{shards.where}: '{other}' and '{stored}' are two names of the same tensor, '{name}'. Save the "
                    "checkpoint again without the one that the model does not use."
                )
        self._read: set[str] = set()
        self._bytes_read = 0
        self._open: dict[str, Any] = {}

    def names(self) -> tuple[str, ...]:
        """Return all canonical names, sorted."""
        return tuple(sorted(self._stored))

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def __len__(self) -> int:
        return len(self._stored)

    def stored_name(self, name: str) -> str:
        """Return the name that the file uses. Raises CheckpointError when there is no such tensor."""
        if name not in self._stored:
            near = difflib.get_close_matches(name, self._stored, n=1, cutoff=0.0)
            nearest = f" The nearest name is '{near[0]}'." if near else ""
            raise CheckpointError(
                f"{self._shards.where}: tensor '{name}' is missing; {len(self._stored)} others are stored.{nearest} "
                "Give a checkpoint that holds it."
            )
        return self._stored[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape from its shard's header."""
        return self._entry(name).shape

    def dtype(self, name: str) -> str:
        """Return a tensor's dtype as safetensors writes it: ``F16``, ``BF16``, ``F32``, …"""
        return self._entry(name).dtype

    def read(self, name: str, *, own: bool = False) -> torch.Tensor:
        """Return one tensor in its stored dtype; of its file nothing else is read but the header.

        It is a view of the mapped file, whose pages count as this process's memory while they stay; with ``own``
        it is memory of its own, gone when the tensor is.

        Raises CheckpointError for a name that is not there or a file that changed since it was opened.
        """
        from safetensors import SafetensorError, safe_open

        stored = self.stored_name(name)
        shard = self._shards.stored[stored]
        entry = self._shards.entry(stored)
        path = self._shards.path(shard)
        tensor: torch.Tensor
        if own:
            tensor = _read_own(path, entry)
            self._count(name, entry)
            return tensor
        try:
            if shard not in self._open:
                require_regular(path)
                self._open[shard] = safe_open(path, framework="pt")
            tensor = self._open[shard].get_tensor(stored)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(
                f"{path}: tensor '{stored}' ({entry.dtype}, shape {entry.shape}) cannot be read: {error}. "
                "Fetch the file again."
            ) from error
        self._count(name, entry)
        return tensor

    def read_rows(self, name: str, rows: Sequence[int] | slice) -> torch.Tensor:
        """Return some rows of a tensor; raises as :meth:`read`."""
        return self.read(name)[rows]

    def sha256(self, names: Iterable[str]) -> str:
        """Return the SHA-256 over canonical name, dtype, shape and raw bytes of tensors, in sorted order.

        It does not depend on sharding or on the layout's names. What it hashes counts as read.
        """
        digest = hashlib.sha256()
        for name in sorted(set(names)):
            entry = self._entry(name)
            digest.update(json.dumps([name, entry.dtype, entry.shape]).encode() + b"\n")
            self._hash_bytes(digest, name, entry)
            self._count(name, entry)
        return digest.hexdigest()

    def share(self, names: Iterable[str]) -> float | None:
        """Return the named tensors' share of all tensor bytes, ``None`` while a shard is not on this machine."""
        return self._shards.share([self._stored[name] for name in names if name in self._stored])

    @property
    def read_names(self) -> frozenset[str]:
        """Canonical names of the tensors whose bytes were read so far."""
        return frozenset(self._read)

    @property
    def bytes_read(self) -> int:
        """Tensor bytes read so far, headers not counted; a tensor read twice counts twice."""
        return self._bytes_read

    def _entry(self, name: str) -> TensorEntry:
        return self._shards.entry(self.stored_name(name))

    def _count(self, name: str, entry: TensorEntry) -> None:
        self._read.add(name)
        self._bytes_read += entry.nbytes

    def _hash_bytes(self, digest: hashlib._Hash, name: str, entry: TensorEntry) -> None:
        path = self._shards.path(self._shards.stored[self.stored_name(name)])
        with open_regular(path) as file:
            file.seek(entry.start)
            left = entry.nbytes
            while left:
                chunk = file.read(min(left, CHUNK_BYTES))
                if not chunk:
                    raise CheckpointError(
                        f"{path}: cut short since it was opened: tensor '{name}' lacks its last {left:,} bytes. "
                        "Fetch the file again."
                    )
                digest.update(chunk)
                left -= len(chunk)


def _read_own(path: Path, entry: TensorEntry) -> torch.Tensor:
    import torch

    dtypes = {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
        "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
        "BOOL": torch.bool,
    }  # fmt: skip
    if entry.dtype not in dtypes:
        raise CheckpointError(f"{path}: tensors of dtype {entry.dtype} cannot be read. Give the checkpoint in 16 bit.")
    content = bytearray(entry.nbytes)
    with open_regular(path) as file:
        file.seek(entry.start)
        if file.readinto(content) != entry.nbytes:
            raise CheckpointError(f"{path}: cut short since it was opened. Fetch the file again.")
    if not content:
        return torch.empty(entry.shape, dtype=dtypes[entry.dtype])
    return torch.frombuffer(content, dtype=dtypes[entry.dtype]).reshape(entry.shape)
