"""Write a guard bundle: all of it under a temporary name, then one rename."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from runtimes.guard.bundle import sha256_of
from safevlm.contract.manifest import MANIFEST_NAME, GuardFile, Manifest, Source, Tap
from safevlm.errors import InputError
from safevlm.files.draft import draft_of, publish
from safevlm.files.storage import storing

if TYPE_CHECKING:
    from safevlm.checkpoint.checkpoint import Checkpoint

__all__ = [
    "bundle_draft",
    "check_destination",
    "data_beside",
    "origin_of",
    "remove_file",
    "write_manifest",
]


def check_destination(out: Path) -> None:
    """Raise InputError unless ``out`` is free, an empty folder, or a bundle that may be replaced."""
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"{out} is a file. Give --out the name of a folder.")
    with storing(out, kept="", advice="give --out another place"):
        filled = any(out.iterdir())
    if filled and not (out / MANIFEST_NAME).is_file():
        raise InputError(
            f"{out} is not a guard bundle and was left unchanged. "
            "Give --out a new or empty folder, or a guard bundle to replace."
        )


@contextmanager
def bundle_draft(out: Path) -> Iterator[Path]:
    """Give a folder to write a bundle's files in; it becomes ``out`` when the block ends without error.

    An existing bundle at ``out`` is replaced at that moment and not before. A draft whose process died is
    removed by the next one. The manifest must have been written: see :func:`write_manifest`.

    Raises InputError when ``out`` holds something that is not a bundle.
    """
    check_destination(out)
    with draft_of(out) as draft, storing(out, advice="give --out another place"):
        yield draft
        Manifest.read(draft)
        publish(draft, out, replace=True)


def origin_of(checkpoint: Checkpoint, *, standalone: bool) -> tuple[Source, Tap]:
    """Return what a manifest says of the checkpoint that it was made from; vision tower and guard are hashed."""
    from runtimes.vllm_guard.head import head_sha256  # torch, which a device has not
    from safevlm.network.head import build_head
    from safevlm.network.reference import guard_sha256

    tap = checkpoint.tap
    source = Source(
        checkpoint=checkpoint.name,
        revision=checkpoint.revision,
        sha256=guard_sha256(checkpoint),
        head_sha256=head_sha256(build_head(checkpoint).linears),
        family=checkpoint.family.key,
        standalone=standalone,
        random_weights=checkpoint.random_weights,
    )
    return source, Tap(
        source=tap.source, pooling=tap.pooling, tokens=tap.tokens, learned=tap.learned, evidence=tap.evidence
    )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json``, replacing an older one in a single step."""
    manifest.write(folder)


def data_beside(path: Path, file: GuardFile) -> list[GuardFile]:
    """Return the entry of the weights beside an ONNX file, if it has any."""
    data = path.with_name(path.name + ".data")
    if not data.exists():
        return []
    return [
        GuardFile(
            path=data.name,
            sha256=sha256_of(data),
            bytes=data.stat().st_size,
            kind="onnx_data",
            role=file.role,
            precision=file.precision,
        )
    ]


def remove_file(path: Path) -> None:
    """Remove an ONNX file of a draft, and its weights beside it."""
    for each in (path, path.with_name(path.name + ".data")):
        each.unlink(missing_ok=True)
