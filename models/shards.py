"""The safetensors files of one checkpoint: which tensor lies in which file.

No file of another format is ever opened; what a file's header says is checked by ``models.shard_header``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath

from models.errors import CheckpointError
from models.json_file import read_json_object
from models.shard_header import TensorEntry, read_header

__all__ = ["Shards"]

INDEX_SUFFIX = ".safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


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
