"""Open a guard bundle: a folder whose ``manifest.json`` lists its files with their SHA-256."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from models.errors import BundleError
from models.manifest import MANIFEST_NAME, GuardFile, Manifest

__all__ = ["Bundle", "FileKind", "open_bundle", "sha256_of"]

FileKind = Literal["onnx", "onnx_data", "engine"]
CHUNK = 2**20


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. ``digest`` is the SHA-256 of the manifest, and through it of everything in it."""

    folder: Path
    manifest: Manifest
    digest: str

    def files(self, kind: FileKind) -> tuple[GuardFile, ...]:
        """Return the files of one kind, the default one first."""
        default = self.manifest.default_file
        chosen = [file for file in self.manifest.files if file.kind == kind]
        return tuple(sorted(chosen, key=lambda file: file.path != default))

    def file(self, precision: str | None = None, kind: FileKind = "onnx") -> GuardFile:
        """Return the file of a precision, or the default one; BundleError lists what there is."""
        files = self.files(kind)
        for file in files:
            if precision is None or file.precision == precision:
                return file
        wanted = f"{kind} file" if precision is None else f"{kind} file of precision {precision!r}"
        there = ", ".join(f"{file.precision} ({file.path})" for file in files) or "none"
        raise BundleError(
            f"{self.folder} has no {wanted}; of this kind there is: {there}. "
            "Choose one of these, or export the bundle again with --precision."
        )

    def path(self, file: GuardFile) -> Path:
        """Return where a listed file lies; BundleError when a link leads out of the folder."""
        path = self.folder / file.path
        try:
            end = path.resolve()
            inside = end.is_relative_to(self.folder.resolve())
        except (OSError, RuntimeError) as error:  # Python < 3.13 calls a loop of links a RuntimeError
            raise BundleError(f"{path} cannot be followed: {error}. Copy the whole bundle again.") from error
        if not inside:
            raise BundleError(
                f"{path} leads out of the bundle, to {end}. "
                "A bundle's files lie in its folder: copy the file in, or export the bundle again."
            )
        return path


def open_bundle(path: Path | str, *, verify: bool = True) -> Bundle:
    """Open the bundle in folder ``path``.

    With ``verify`` every listed file is read once and compared with its size and hash; without, only its
    place and presence are checked (for a bundle that this process has just written or verified).
    """
    folder = Path(path)
    if not folder.is_dir():
        found = "a file" if folder.exists() else "missing"
        raise BundleError(
            f"{folder} is {found}, not a guard bundle. A bundle is a folder with a {MANIFEST_NAME}, as "
            "`python -m export.onnx --model M --out DIR` writes it."
        )
    manifest = Manifest.read(folder)
    bundle = Bundle(folder=folder, manifest=manifest, digest=sha256_of(folder / MANIFEST_NAME))
    for file in manifest.files:
        _check_file(bundle, file, verify=verify)
    return bundle


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def _check_file(bundle: Bundle, file: GuardFile, *, verify: bool) -> None:
    path = bundle.path(file)
    if not path.is_file():
        raise BundleError(f"{path} is listed in the manifest but missing. Copy the whole bundle again.")
    size = path.stat().st_size
    if size != file.bytes:
        _altered(path, f"it has {size} bytes, the manifest says {file.bytes}")
    if not verify:
        return
    try:
        found = sha256_of(path)
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror or error}.") from error
    if found != file.sha256:
        _altered(path, f"its SHA-256 is {found}, the manifest says {file.sha256}")


def _altered(path: Path, reason: str) -> None:
    raise BundleError(f"{path} was altered: {reason}. Copy the bundle again, or export it anew.")
