"""Open a folder of GGUF files: ``gguf.json`` lists them with their SHA-256."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from runtimes.guard.bundle import inside, size_and_sha256
from safevlm.checkpoint.family import HEAD_PREFIX
from safevlm.checkpoint.weights.shard_header import read_header
from safevlm.contract.gguf_manifest import (
    COPY_AGAIN,
    GGUF_MANIFEST_NAME,
    GgufFile,
    GgufHead,
    GgufManifest,
    gguf_manifest_bytes,
)
from safevlm.errors import BundleError
from safevlm.files.regular_file import is_file, read_regular

__all__ = ["GgufArtifact", "HeadWeights", "is_gguf", "open_gguf"]


@dataclass(frozen=True, kw_only=True)
class HeadWeights:
    """A guard head in numpy: N × P pooled features to N × C logits, all float32.

    ``layers`` are (weight R × C, bias R) of its linears, exact GELU between them.
    """

    layers: tuple[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]], ...]


@dataclass(frozen=True)
class GgufArtifact:
    """An opened folder; ``digest`` is the SHA-256 of its manifest, and through it of everything in it."""

    folder: Path
    manifest: GgufManifest
    digest: str

    def path(self, file: GgufFile) -> Path:
        """Return where a listed file lies. Raises BundleError when a link leads out of the folder."""
        return inside(self.folder, file.path)

    def weights(self, head: GgufHead) -> HeadWeights:
        """Read a head. Raises BundleError when its tensors are not those that the manifest states."""
        file = next(file for file in self.manifest.files if file.path == head.file)
        path = self.path(file)
        entries = read_header(path)
        try:
            content = read_regular(path, file.bytes)
        except OSError as error:
            raise BundleError(f"{path} cannot be read: {error.strerror or error}. {COPY_AGAIN}") from error
        _compare(path, file, len(content), hashlib.sha256(content).hexdigest())
        layers = []
        for number, (inner, outer) in enumerate(zip(head.widths, head.widths[1:], strict=False)):
            pair = []
            for leaf, shape in (("weight", (outer, inner)), ("bias", (outer,))):
                name = f"{HEAD_PREFIX}mlp.{3 * number}.{leaf}"
                entry = entries.get(name)
                if entry is None or entry.shape != shape or entry.dtype != "F32":
                    found = "missing" if entry is None else f"{entry.dtype} {entry.shape}"
                    raise BundleError(f"{path}: '{name}' is {found}, but must be F32 {shape}. {COPY_AGAIN}")
                pair.append(np.frombuffer(content[entry.start : entry.end], "<f4").reshape(shape))
            layers.append((pair[0], pair[1]))
        return HeadWeights(layers=tuple(layers))


def is_gguf(model: str | Path) -> bool:
    """Say whether a model is a folder of GGUF files, or one of them."""
    path = Path(model)
    return path.suffix == ".gguf" or is_file(path / GGUF_MANIFEST_NAME)


def open_gguf(model: str | Path, *, verify: bool = True) -> GgufArtifact:
    """Open a folder, or the folder that a ``.gguf`` file lies in.

    With ``verify`` every listed file is read once and compared with its hash, so that a projector of another model
    is refused; without, sizes alone are compared. Raises BundleError.
    """
    folder = Path(model)
    chosen = None
    if folder.suffix == ".gguf":
        folder, chosen = folder.parent, folder.name
    place = inside(folder, GGUF_MANIFEST_NAME)
    stated = gguf_manifest_bytes(folder)
    manifest = GgufManifest.from_bytes(stated, where=str(place))
    if chosen is not None and chosen != manifest.file("model").path:
        raise BundleError(
            f"{model} is not the language model of {folder / GGUF_MANIFEST_NAME}, which is "
            f"{manifest.file('model').path}. The guard in that folder belongs to that file, so give the folder."
        )
    artifact = GgufArtifact(folder, manifest, hashlib.sha256(stated).hexdigest())
    for file in manifest.files:
        _check(artifact, file, verify=verify)
    return artifact


def _check(artifact: GgufArtifact, file: GgufFile, *, verify: bool) -> None:
    path = artifact.path(file)
    try:
        size, digest = size_and_sha256(path, file.bytes, verify=verify)
    except FileNotFoundError as error:
        raise BundleError(f"{path} is listed in {GGUF_MANIFEST_NAME} but missing. {COPY_AGAIN}") from error
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror or error}. {COPY_AGAIN}") from error
    _compare(path, file, size, digest)


def _compare(path: Path, file: GgufFile, size: int, sha256: str | None) -> None:
    found = f"{size} bytes" if size != file.bytes else None
    if found is None and sha256 is not None and sha256 != file.sha256:
        found = f"SHA-256 {sha256[:12]}…"
    if found is not None:
        wanted = f"{file.bytes} bytes and SHA-256 {file.sha256[:12]}…"
        what = {"model": "language model", "mmproj": "projector", "head": "guard head"}[file.role]
        raise BundleError(
            f"{path} is not the {what} of this folder: it has {found}, the manifest says {wanted}. A file of another "
            f"model would give noise. {COPY_AGAIN}"
        )
