"""Expand the functions that a model carries, for readers that know standard operators alone.

Preserves every value: the function's body is what its node means. Weights beside the file stay there. Source: the
ONNX IR specification, "Functions"; ``onnx.inliner``.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from models.errors import MissingExtraError

__all__ = ["to_standard"]


def to_standard(source: Path, target: Path) -> None:
    """Write the graph of ``source`` to ``target`` without functions; weights beside it are linked to, not copied.

    Errors: MissingExtraError without the package onnx.
    """
    try:
        import onnx
        from onnx import inliner
    except ImportError as error:
        raise MissingExtraError("onnx", "trt", "expanding a guard's functions") from error
    model = onnx.load(str(source), load_external_data=False)
    model = inliner.inline_local_functions(model)
    standard = [opset for opset in model.opset_import if opset.domain in ("", "ai.onnx")]
    del model.opset_import[:]
    model.opset_import.extend(standard)
    data = source.with_name(source.name + ".data")
    if data.exists():
        _give(data.resolve(), target.with_name(data.name))
    onnx.save(model, str(target))


def _give(data: Path, there: Path) -> None:
    """Put a file under a second name: as the same file where the disk can, since readers refuse links that lead away."""
    try:
        os.link(data, there)
    except OSError:  # another file system, or one without such links
        shutil.copyfile(data, there)
