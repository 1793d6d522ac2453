"""Which files of a folder are the checkpoint's weights, chosen in transformers' order.

==  =========================================  ======================================================
1   the file that ``transformers_weights``     of ``config.json``: a ``.safetensors`` file or an index
    names
2   ``model.safetensors``                      even beside an index
3   ``model.safetensors.index.json``
4   ``pytorch_model.bin``, or its index        refused: a pickle
5   another index, if it is the only one       transformers asks for its ``variant``
6   one other file, or one complete set        transformers reads none of these; two candidates are
    ``…-00001-of-00003.safetensors``           refused
==  =========================================  ======================================================

The order is that of ``modeling_utils._get_resolved_checkpoint_files`` in transformers 5.17. A pickle is never read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

from safevlm.errors import CheckpointError

__all__ = ["WeightFiles", "choose_weights", "stays_inside"]

INDEX_SUFFIX = ".safetensors.index.json"
SINGLE = "model.safetensors"
INDEX = "model" + INDEX_SUFFIX
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
PICKLED = frozenset(("pytorch_model.bin", "pytorch_model.bin.index.json"))
WEIGHT_SUFFIXES = (*PICKLE_SUFFIXES, ".safetensors", ".index.json", ".gguf", ".h5", ".msgpack", ".npz", ".onnx")
TRAINING_STATE = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state(_\d+)?)\.(bin|pt|pth)")
"""What transformers' Trainer leaves behind: no weights."""
NUMBERED = re.compile(r"(?P<stem>.+-)(?P<number>\d+)(?P<of>-of-)(?P<total>\d+)(?P<suffix>\.safetensors)")
MAX_NUMBERED = 10_000


@dataclass(frozen=True, kw_only=True)
class WeightFiles:
    """What is read of a folder: an index, or files whose headers say what they hold."""

    index: str | None
    shards: tuple[str, ...] = ()
    """The files without an index; empty with one."""

    def ignored(self, files: Collection[str], placed: Collection[str]) -> tuple[str, ...]:
        """Return the other weight files among ``files``; ``placed`` are the shards that hold the tensors."""
        read = {self.index, *self.shards, *placed}
        others = (name for name in files if name.endswith(WEIGHT_SUFFIXES) and name not in read)
        return tuple(sorted(name for name in others if TRAINING_STATE.fullmatch(name) is None))


def choose_weights(
    where: str, files: Collection[str], *, stated: object = None, exists: Callable[[str], bool]
) -> WeightFiles:
    """Choose among the top-level ``files`` of a checkpoint named ``where``.

    ``stated`` is ``transformers_weights`` of its config.json; ``exists`` knows every file, also below the top level.
    Raises CheckpointError when nothing can be read, a shard of a numbered set is missing, or several candidates are
    left.
    """
    if stated is not None:
        return _stated(where, stated, exists)
    if SINGLE in files:
        return WeightFiles(index=None, shards=(SINGLE,))
    indexes = sorted(name for name in files if name.endswith(INDEX_SUFFIX))
    if INDEX in indexes:
        return WeightFiles(index=INDEX)
    taken = sorted(PICKLED & set(files))
    others = sorted(name for name in files if name.endswith(".safetensors"))
    if taken and others:
        raise CheckpointError(
            f"{where}: transformers would read the pickle '{taken[0]}', which is never opened here; '{others[0]}' may "
            "hold other weights. Remove the pickle if the weights are the same, or keep one set."
        )
    if len(indexes) > 1:
        raise CheckpointError(
            f"{where}: several indexes ({', '.join(indexes)}), none of them named '{INDEX}'. Keep one."
        )
    if indexes:
        return WeightFiles(index=indexes[0])
    return WeightFiles(index=None, shards=_only_set(where, files))


def stays_inside(name: str, suffix: str = ".safetensors") -> bool:
    """Say whether a name is a plain relative path to a file of this ending inside the folder."""
    return name.endswith(suffix) and not re.search(r"[\\:\0]", name) and not {"", ".", ".."} & set(name.split("/"))


def _stated(where: str, stated: object, exists: Callable[[str], bool]) -> WeightFiles:
    if isinstance(stated, str) and stays_inside(stated) and exists(stated):
        return WeightFiles(index=None, shards=(stated,))
    if isinstance(stated, str) and stays_inside(stated, INDEX_SUFFIX) and exists(stated):
        return WeightFiles(index=stated)
    raise CheckpointError(
        f"{where}: config.json states transformers_weights = {stated!r}; it must name a .safetensors file of this "
        "folder, or the index of one. Fetch that file into the folder, or remove the key."
    )


def _only_set(where: str, files: Collection[str]) -> tuple[str, ...]:
    """Return the one file or the one complete numbered set among the .safetensors ``files``."""
    found = sorted(name for name in files if name.endswith(".safetensors"))
    if not found:
        raise _no_safetensors(where, files)
    sets: dict[tuple[str, ...], list[str]] = {}
    for name in found:
        numbered = NUMBERED.fullmatch(name)
        sets.setdefault((numbered["stem"], numbered["total"]) if numbered else (name,), []).append(name)
    if len(sets) > 1:
        shown = ", ".join(f"'{names[0]}'" for names in list(sets.values())[:3])
        raise CheckpointError(
            f"{where}: {len(sets)} sets of weights ({shown}{', …' if len(sets) > 3 else ''}), and neither '{SINGLE}' "
            f"nor '{INDEX}' says which one is the checkpoint. Keep one, or write the index again."
        )
    _check_complete(where, found)
    return tuple(found)


def _check_complete(where: str, found: list[str]) -> None:
    first = NUMBERED.fullmatch(found[0])
    if first is None:
        return
    total = int(first["total"])
    for number in range(1, min(total, MAX_NUMBERED) + 1):
        expected = f"{first['stem']}{number:0{len(first['number'])}}{first['of']}{first['total']}{first['suffix']}"
        if expected not in found:
            raise CheckpointError(
                f"{where}: shard '{expected}' is missing ('{found[0]}' says there are {total}). "
                "Fetch it again into the same folder."
            )


def _no_safetensors(where: str, files: Collection[str]) -> CheckpointError:
    pickles = sorted(name for name in files if name.endswith(PICKLE_SUFFIXES))
    if pickles:
        return _pickled(where, pickles)
    hint = ""
    if "manifest.json" in files:
        hint = " It looks like a guard bundle: pass it as --bundle where a command takes one."
    elif any(name.endswith(".gguf") for name in files):
        hint = " It holds GGUF files, which have no guard head: give the checkpoint that they were made from."
    return CheckpointError(
        f"{where}: it holds no .safetensors file. A checkpoint is a folder with config.json and "
        f"model.safetensors, or shards with an index beside them.{hint}"
    )


def _pickled(where: str, pickles: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{where}: its weights are stored as pickle only ({', '.join(pickles[:3])}). Loading a pickle can run any "
        "code in it, so only .safetensors files are opened. Convert it on a machine where you trust it: load the "
        "state dict with torch.load(FILE, weights_only=True) and write it with "
        "safetensors.torch.save_file(state, 'model.safetensors'), then give that folder."
    )
