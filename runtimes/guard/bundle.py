"""Open a guard bundle: a folder whose ``manifest.json`` lists its files with their SHA-256.

What is opened is checked once, here. A runtime then opens its file again by path, so whoever can write into the folder
could swap it in between: keep bundles where only those who may change them can write. An engine is read by
:meth:`Bundle.content`, which checks the very bytes that it returns.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Literal

from runtimes.guard.onnx_file import OnnxTensor, read_onnx
from safevlm.contract.graph_fit import Role, TensorSpec, misfit
from safevlm.contract.manifest import MANIFEST_NAME, GuardFile, Manifest, manifest_bytes
from safevlm.errors import BundleError
from safevlm.files.regular_file import is_folder, open_regular, read_regular
from safevlm.terminal.printable import shortened

__all__ = ["Bundle", "FileKind", "inside", "open_bundle", "sha256_of", "size_and_sha256", "specs"]

FileKind = Literal["onnx", "onnx_data", "engine"]
CHUNK = 2**20
DOMAINS = frozenset({"", "ai.onnx", "com.microsoft"})
"""Whose operators a guard may use: the standard's, and those of ONNX Runtime's quantizer."""
UNWANTED = frozenset(
    ("EPContext", "Loop", "Scan", "Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform")
) | {"RandomUniformLike"}
"""Operators that open a further file, need not end, or answer differently each time."""


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. ``digest`` is the SHA-256 of the manifest, and through it of everything in it."""

    folder: Path
    manifest: Manifest
    digest: str

    def files(self, kind: FileKind, role: Role | None = None) -> tuple[GuardFile, ...]:
        """Return the files of one kind, and role if one is given, the default one first."""
        default = self.manifest.default_file
        chosen = [file for file in self.manifest.files if file.kind == kind and role in (None, file.role)]
        return tuple(sorted(chosen, key=lambda file: file.path != default))

    def file(self, precision: str | None = None, kind: FileKind = "onnx") -> GuardFile:
        """Return the file of a precision, or the default one; BundleError lists what there is."""
        files = self.files(kind)
        for file in files:
            if precision is None or file.precision == precision:
                return file
        wanted = f"{kind} file" if precision is None else f"{kind} file of precision {precision!r}"
        if kind == "engine" and not files:
            raise BundleError(
                f"{self.folder} has no {wanted}. Build one for this GPU: python -m export.trt --bundle {self.folder}"
            )
        there = ", ".join(f"{file.precision} ({file.path})" for file in files) or "none"
        raise BundleError(
            f"{self.folder} has no {wanted}; it has: {there}. "
            "Choose one of these, or export the bundle again with --precision."
        )

    def path(self, file: GuardFile) -> Path:
        """Return where a listed file lies; BundleError when a link leads out of the folder."""
        return inside(self.folder, file.path)

    def content(self, file: GuardFile) -> bytes:
        """Return a listed file's bytes; BundleError unless they are those that the manifest lists."""
        path = self.path(file)
        try:
            content = read_regular(path, file.bytes)
        except OSError as error:
            raise BundleError(f"{path} cannot be read: {error.strerror or error}.") from error
        _compare(path, file, len(content), hashlib.sha256(content).hexdigest())
        return content


def inside(folder: Path, name: str) -> Path:
    """Return the place of a file in a folder. Raises BundleError when a link leads out of the folder."""
    path = folder / name
    try:
        end = path.resolve()
        stays = end.is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError) as error:  # Python < 3.13 calls a loop of links a RuntimeError
        raise BundleError(f"{path} is a link that cannot be followed: {error}. Copy the whole bundle again.") from error
    if not stays:
        raise BundleError(
            f"{path} leads out of the bundle, to {end}. "
            "Copy the file into the bundle's folder, or export the bundle again."
        )
    return path


def open_bundle(path: Path | str, *, verify: bool = True) -> Bundle:
    """Open the bundle in folder ``path``.

    With ``verify`` every listed file is read once and compared with its size and hash; without, only its place, size
    and kind are checked (for a bundle that this process has just written or verified). Either way each ONNX file must
    have the inputs and outputs of a guard with the manifest's classes and preprocessing, and may name no weights that
    the manifest does not list. An engine can be asked that only by TensorRT, when its runner is activated.
    """
    folder = Path(path)
    if not is_folder(folder):
        found = "a file" if os.path.lexists(folder) else "missing"
        raise BundleError(
            f"{folder} is {found}, not a guard bundle. A bundle is a folder with a {MANIFEST_NAME}, as "
            "`python -m export.onnx --model M --out DIR` writes it."
        )
    place = inside(folder, MANIFEST_NAME)
    content = manifest_bytes(place)
    manifest = Manifest.from_bytes(content, where=str(place))
    bundle = Bundle(folder=folder, manifest=manifest, digest=hashlib.sha256(content).hexdigest())
    for file in manifest.files:
        _check_file(bundle, file, verify=verify)
    for file in bundle.files("onnx"):
        _check_graph(bundle, file)
    return bundle


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a regular file's content, read in pieces. Raises OSError."""
    with open_regular(path) as stream:
        return _sha256(stream)


def _sha256(stream: BinaryIO) -> str:
    digest = hashlib.sha256()
    while piece := stream.read(CHUNK):
        digest.update(piece)
    return digest.hexdigest()


def size_and_sha256(path: Path, wanted: int, *, verify: bool) -> tuple[int, str | None]:
    """Return how many bytes a regular file has and, with ``verify`` and if they are ``wanted``, its SHA-256."""
    with open_regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        return size, _sha256(stream) if verify and size == wanted else None


def _check_file(bundle: Bundle, file: GuardFile, *, verify: bool) -> None:
    path = bundle.path(file)
    try:
        size, found = size_and_sha256(path, file.bytes, verify=verify)
    except FileNotFoundError as error:
        raise BundleError(f"{path} is listed in the manifest but missing. Copy the whole bundle again.") from error
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror or error}. Copy the bundle again.") from error
    _compare(path, file, size, found)


def _compare(path: Path, file: GuardFile, size: int, sha256: str | None) -> None:
    reason = None
    if size != file.bytes:
        reason = f"it has {size} bytes, the manifest says {file.bytes}"
    elif sha256 not in (None, file.sha256):
        reason = f"its SHA-256 is {sha256}, the manifest says {file.sha256}"
    if reason is not None:
        raise BundleError(f"{path} was altered: {reason}. Copy the bundle again, or export it again.")


def _check_graph(bundle: Bundle, file: GuardFile) -> None:
    """Compare what an ONNX file says of itself with the manifest. Raises BundleError."""
    path = bundle.path(file)
    facts = read_onnx(path)
    manifest = bundle.manifest
    inputs, outputs = specs(facts.inputs, str(path)), specs(facts.outputs, str(path))
    problem = misfit(file.role, inputs, outputs, manifest.preprocessing, len(manifest.classes))
    stated = [_told(file.inputs), _told(file.outputs)]
    if problem is None and any(stated) and stated != [_told(inputs), _told(outputs)]:
        problem = "its inputs and outputs are not those that the manifest states"
    beside = PurePosixPath(file.path).parent
    listed = {other.path for other in bundle.files("onnx_data")}
    strangers = sorted(place for place in facts.external if str(beside / place) not in listed)
    if problem is None and strangers:
        problem = f"it keeps weights in '{shortened(strangers[0])}', which the manifest does not list"
    foreign = sorted(facts.domains - DOMAINS) or sorted(facts.operators & UNWANTED)
    if problem is None and foreign:
        problem = f"it needs the operators '{shortened(foreign[0])}', which are not allowed in a guard"
    if problem is not None:
        raise BundleError(f"{path} does not fit its manifest: {problem}. Export the bundle again.")


def specs(tensors: Iterable[OnnxTensor], where: str) -> tuple[TensorSpec, ...]:
    """Return tensors as a manifest states them, sides that are not fixed as ``N``. Raises BundleError."""
    try:
        return tuple(
            TensorSpec(
                name=each.name, shape=tuple("N" if side is None else side for side in each.shape), dtype=each.dtype
            )
            for each in tensors
        )
    except ValueError as error:
        raise BundleError(f"{where}: its graph has a name or shape that is not allowed. Export it again.") from error


def _told(tensors: Iterable[TensorSpec]) -> list[tuple[str, str, tuple[int | str, ...]]]:
    return sorted((each.name, each.dtype, each.shape) for each in tensors)
