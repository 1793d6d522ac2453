"""The safetensors files of one checkpoint: which tensor lies in which file.

No file of another format is ever opened; what a file's header says is checked by
``safevlm.checkpoint.weights.shard_header``. The guard head may lie beside them in :data:`GUARD_FILE`, a file of its
own: what serves the model alone (vLLM, for one) refuses tensors that it has no module for, and looks into no subfolder.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from safevlm.checkpoint.adapter import refuse_adapter_files, refuse_adapter_tensors
from safevlm.checkpoint.family import HEAD_PREFIX, HEAD_RENAME
from safevlm.checkpoint.weights.shard_header import TensorEntry, read_header
from safevlm.checkpoint.weights.weight_files import choose_weights, stays_inside
from safevlm.errors import CheckpointError
from safevlm.files.json_file import read_json_object

__all__ = ["GUARD_FILE", "Shards"]

GUARD_FILE = "guard/head.safetensors"


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
        Raises CheckpointError when there are none, only pickles, an index that cannot be used, or an adapter that
        is not merged.
        """
        refuse_adapter_files(where, files)
        self.where = where
        self._path_of = path_of
        self._paths: dict[str, Path] = {}
        self._headers: dict[str, dict[str, TensorEntry]] = {}
        chosen = choose_weights(where, files, stated=stated, exists=exists)
        self.index = chosen.index
        self._indexed: frozenset[str] = frozenset()
        if self.index is not None:
            self.stored: dict[str, str] = _read_index(folder / self.index, where, exists)
        else:
            self.stored = {}
            for shard in chosen.shards:
                for name in self.header(shard):
                    self._place(name, shard)
        if self.index is not None:
            self._indexed = frozenset(self.stored.values())
        if exists(GUARD_FILE):
            self._place_guard()
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

        Raises CheckpointError for a damaged shard or one that disagrees with the index.
        """
        if shard not in self._headers:
            header = read_header(self.path(shard))
            if shard in self._indexed:
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

    def _place_guard(self) -> None:
        """Add the guard head's own file, which holds nothing else: no other reader of the checkpoint sees it."""
        for name in self.header(GUARD_FILE):
            if not HEAD_RENAME.compiled.match(name):
                raise CheckpointError(
                    f"{self.where}: '{GUARD_FILE}' holds tensor '{name[:200]}'; only '{HEAD_PREFIX}mlp.*' is allowed "
                    "there. Fetch the file again."
                )
            self._place(name, GUARD_FILE)

    def _place(self, name: str, shard: str) -> None:
        other = self.stored.setdefault(name, shard)
        if other != shard:
            raise CheckpointError(
                f"{self.where}: tensor '{name}' is in two shards, '{other}' and '{shard}'. Remove the file that does "
                "not belong to this checkpoint."
            )

    def _check_against_index(self, shard: str, header: Mapping[str, TensorEntry]) -> None:
        for name in header:
            if name not in self.stored:
                raise CheckpointError(
                    f"{self.where}: shard '{shard}' holds tensor '{name}', which '{self.index}' does not list. Index "
                    "and shards must belong to the same checkpoint: fetch both again, or write the index again."
                )
            self._place(name, shard)
        for name, place in self.stored.items():
            if place == shard and name not in header:
                raise CheckpointError(
                    f"{self.where}: '{self.index}' places tensor '{name}' in shard '{shard}', which lacks it. Index "
                    "and shards must belong to the same checkpoint: fetch both again."
                )


def _read_index(path: Path, where: str, exists: Callable[[str], bool]) -> dict[str, str]:
    """Return stored name -> shard of an index whose shards all exist and lie inside the folder."""
    placed = read_json_object(path, needed_for="a checkpoint's index").get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise CheckpointError(
            f"{path}: 'weight_map' must be a non-empty object that maps tensor names to shards. Fetch the index again."
        )
    for name, shard in placed.items():
        if not isinstance(shard, str) or not stays_inside(shard):
            raise CheckpointError(
                f"{path}: tensor '{name}' is placed in {shard!r}; only a .safetensors file inside the folder is "
                "allowed. Do not use this checkpoint unless you know who wrote its index."
            )
    for shard in sorted(set(placed.values())):
        if not exists(shard):
            lost = sorted(name for name, place in placed.items() if place == shard)
            raise CheckpointError(
                f"{where}: shard '{shard}' is missing; '{path.name}' places {len(lost)} tensors in it, "
                f"'{lost[0]}' among them. Fetch it again into the same folder."
            )
    return placed
