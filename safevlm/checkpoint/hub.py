"""From what a user calls a checkpoint to a folder on this machine, through huggingface_hub.

The hub's cache, ``HF_TOKEN``, ``HF_ENDPOINT`` and ``HF_HUB_OFFLINE`` behave as its users know them. Only JSON,
tokenizer, processor and safetensors files are fetched, plus small ``*.py`` files as text to look for the guard's
tap; pickles and GGUF never are, and nothing fetched is ever imported.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from safevlm.checkpoint.families import FAMILIES
from safevlm.checkpoint.hub_failures import Wanted, bound_waiting, hub_error, hub_failures
from safevlm.checkpoint.tap import MAX_SOURCE_BYTES, MAX_SOURCE_FILES
from safevlm.errors import CheckpointError, InputError

__all__ = [
    "KNOWN_CHECKPOINTS",
    "LIGHT_PATTERNS",
    "MODELS_VARIABLE",
    "TINY_CHECKPOINTS",
    "HubCheckpoint",
    "ModelReference",
    "fetch_checkpoint",
    "find_model",
]

KNOWN_CHECKPOINTS: Mapping[str, str] = MappingProxyType(
    {
        name: f"etri-vilab/{name}"
        for name in (
            "SafeLLaVA-7B",
            "SafeLLaVA-13B",
            "SafeQwen2.5-VL-7B",
            "SafeQwen2.5-VL-32B",
            "SafeGem-12B",
            "SafeGem-27B",
        )
    }
)
"""The six published checkpoints: short name -> hub id."""

TINY_CHECKPOINTS = tuple(family.tiny for family in FAMILIES.values())
TINY_FOLDER = Path(__file__).parents[1] / "tiny_checkpoints"
MODELS_VARIABLE = "SAFEVLM_MODELS"

LIGHT_PATTERNS = ("*.json", "*.jinja", "*tokenizer*.model", "merges.txt", "vocab.txt")
HEAVY_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.gguf", "*.safetensors", "*.onnx")


@dataclass(frozen=True, kw_only=True)
class ModelReference:
    """What ``--model`` meant: a folder on this machine, or a repository of the hub at a revision."""

    name: str
    folder: Path | None = None
    repo_id: str | None = None
    revision: str | None = None


@dataclass(frozen=True, kw_only=True)
class HubCheckpoint:
    """One commit of a hub repository: its light files in ``folder``, its shards on demand."""

    repo_id: str
    folder: Path
    commit: str
    files: frozenset[str]
    """Every file of that commit, fetched or not."""

    def shard(self, filename: str) -> Path:
        """Return the path of a safetensors file of this commit, downloading it on first use.

        Raises CheckpointError for a file of another kind or one the commit lacks; HubError when the hub fails.
        """
        if not filename.endswith(".safetensors") or filename not in self.files:
            raise CheckpointError(
                f"{self.repo_id}: '{filename}' is not one of the .safetensors files of commit {self.commit}. "
                "Only those are fetched. Try another revision."
            )
        return _fetch_file(self.repo_id, filename, self.commit)


def find_model(model: str | Path, revision: str | None = None) -> ModelReference:
    """Say what a ``--model`` argument means, looking at this machine first and asking no server.

    A tiny name, an existing folder, one of the six names (then a folder of that name under the current directory or
    ``$SAFEVLM_MODELS``, otherwise the hub), or a hub id; the last two may end in ``@revision``. Raises InputError for
    anything else, with the nearest name.
    """
    text = str(model)
    if text in TINY_CHECKPOINTS:
        return _local(text, _tiny_folder(text), revision)
    path = _existing_path(text)
    if path is not None and path.is_dir():
        return _local(path.resolve().name, path, revision)
    if path is not None:
        raise InputError(f"'{text}' is a file; a checkpoint is a folder. Give the folder it lies in.")
    if isinstance(model, Path):
        raise InputError(f"'{text}': there is no such folder. {_allowed()}")
    base, at, pinned = text.partition("@")
    if at and not pinned:
        raise InputError(f"'{text}': a revision must follow the '@', such as '{base}@main'.")
    if pinned and revision is not None and pinned != revision:
        raise InputError(f"'{text}' and revision '{revision}' contradict each other. Give one of them.")
    revision = pinned or revision
    if base in KNOWN_CHECKPOINTS:
        found = None if revision else _find_downloaded(base)
        if found is not None:
            return _local(base, found, None)
        return ModelReference(name=base, repo_id=KNOWN_CHECKPOINTS[base], revision=revision)
    if _looks_like_hub_id(base):
        return ModelReference(name=base, repo_id=base, revision=revision)
    raise InputError(_unknown(text))


def fetch_checkpoint(repo_id: str, revision: str | None = None) -> HubCheckpoint:
    """Resolve a revision to its commit and fetch that commit's light files, and no shard.

    Raises HubError for a repository or revision that is missing, gated or out of reach.
    """
    from huggingface_hub import get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    bound_waiting()
    try:
        folder = Path(
            snapshot_download(
                repo_id,
                revision=revision,
                allow_patterns=list(LIGHT_PATTERNS),
                ignore_patterns=list(HEAVY_PATTERNS),
            )
        )
    except hub_failures() as error:
        raise hub_error(error, Wanted(repo_id, revision), _allowed()) from error
    commit = folder.name
    try:
        sizes = {file.path: file.size for file in get_cached_repo_tree(repo_id, revision=commit)}
    except CachedRepoTreeNotFoundError:
        # A cache filled by an older huggingface_hub, used offline: what lies in the snapshot is all there is.
        found = [path for path in folder.rglob("*") if path.is_file()]
        sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in found}
    sources = sorted(name for name, size in sizes.items() if name.endswith(".py") and size <= MAX_SOURCE_BYTES)
    for source in sources[:MAX_SOURCE_FILES]:
        _fetch_file(repo_id, source, commit)
    return HubCheckpoint(repo_id=repo_id, folder=folder, commit=commit, files=frozenset(sizes))


def _existing_path(text: str) -> Path | None:
    try:
        path = Path(text).expanduser()
        return path if text and path.exists() else None
    except (OSError, RuntimeError, ValueError):  # no path at all: too long, a null byte, an unknown home
        return None


def _local(name: str, folder: Path, revision: str | None) -> ModelReference:
    if revision is not None:
        raise InputError(
            f"revision '{revision}' is given, but '{name}' is a folder on this machine ({folder}), and folders have "
            "no revisions. Leave the revision out, or give a hub id."
        )
    return ModelReference(name=name, folder=folder)


def _tiny_folder(name: str) -> Path:
    folder = TINY_FOLDER / name
    if not folder.is_dir():
        raise InputError(
            f"'{name}' is a checkpoint that ships with this project, but {folder} is missing. Install safevlm-edge "
            "again, or work in a complete clone."
        )
    return folder


def _find_downloaded(name: str) -> Path | None:
    """Return ``$SAFEVLM_MODELS/name`` if it is there (the current directory was looked at before)."""
    root = os.environ.get(MODELS_VARIABLE)
    folder = Path(root).expanduser() / name if root else None
    return folder if folder is not None and folder.is_dir() else None


def _looks_like_hub_id(text: str) -> bool:
    owner, _, name = text.partition("/")
    plain = owner + name
    return bool(owner and name and plain[0] not in ".~") and all(c.isalnum() or c in "-_." for c in plain)


def _unknown(text: str) -> str:
    names = (*KNOWN_CHECKPOINTS, *TINY_CHECKPOINTS)
    lowered = {name.lower(): name for name in names}
    near = difflib.get_close_matches(text.partition("@")[0].lower(), lowered, n=1, cutoff=0.6)
    guess = f" Did you mean '{lowered[near[0]]}'?" if near else ""
    return f"'{text}' is neither a folder nor a known checkpoint.{guess} {_allowed()}"


def _allowed() -> str:
    return (
        f"Allowed are: a folder; one of {', '.join(KNOWN_CHECKPOINTS)}; a hub id such as owner/name or "
        f"owner/name@revision; one of {', '.join(TINY_CHECKPOINTS)}."
    )


def _fetch_file(repo_id: str, filename: str, commit: str) -> Path:
    from huggingface_hub import hf_hub_download

    bound_waiting()
    try:
        return Path(hf_hub_download(repo_id, filename, revision=commit))
    except hub_failures() as error:
        raise hub_error(error, Wanted(repo_id, commit, filename), _allowed()) from error
