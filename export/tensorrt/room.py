"""How much room an engine needs: on the disk, and of the GPU's memory while it is built and while it runs.

Measured with TensorRT-RTX 1.7.1's builder ("Max Scratch Memory" in its log) on one layer of each tower at its real
size. In float32 it writes attention's scores out, twice: 2.1 of 2.25 GB an image for SafeGem's 4,096 tokens. In float16
one kernel computes attention without them. What else a layer holds is about twice its widest activation. An INT8
graph's products stand between float32 values, so it needs what a float32 one does.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path

from export.tensorrt.builder import USUAL_BATCH
from runtimes.guard.bundle import Bundle
from runtimes.guard.cuda import tensorrt_extra
from safevlm.contract.manifest import GuardFile
from safevlm.errors import EngineUnavailableError, MissingExtraError
from safevlm.files.storage import shown_bytes

__all__ = ["check_room", "default_batch", "scratch_bytes", "stored_bytes"]

USUAL_SCRATCH = 4 * 2**30
"""Scratch memory that a batch by default may need."""
SCORES_HELD, WIDEST_HELD = 2, 2
FLOAT32 = 4


def scratch_bytes(path: Path, *, fused: bool) -> int:
    """Return the scratch memory an image that an engine of the ONNX file at ``path`` needs.

    ``fused`` attention, that of float16, holds no scores. Raises MissingExtraError without the package onnx.
    """
    sizes = list(_activations(path))
    scores = max((size for size, is_score in sizes if is_score), default=0)
    widest = max((size for size, is_score in sizes if not is_score), default=0)
    return WIDEST_HELD * widest + (0 if fused else SCORES_HELD * scores)


def _activations(path: Path) -> Iterator[tuple[int, bool]]:
    """Yield the bytes of each activation of one image, and whether it is the scores of an attention."""
    try:
        import onnx
        from onnx import TensorProto, inliner, shape_inference
    except ImportError as error:
        raise MissingExtraError("onnx", tensorrt_extra(), "estimating an engine's memory") from error
    wide = {TensorProto.FLOAT: FLOAT32, TensorProto.FLOAT16: 2}
    model = inliner.inline_local_functions(onnx.load(str(path), load_external_data=False))
    del model.graph.value_info[:]  # what an exporter knew of a graph that was rewritten since
    graph = shape_inference.infer_shapes(model, data_prop=True).graph
    scores = {name for node in graph.node if node.op_type == "Softmax" for name in (node.input[0], node.output[0])}
    for value in graph.value_info:
        kind = value.type.tensor_type
        sides = [side.dim_value or 1 for side in kind.shape.dim]  # the batch is left open
        if len(sides) > 1 and kind.elem_type in wide and not kind.shape.dim[0].dim_value:
            yield wide[kind.elem_type] * math.prod(sides), value.name in scores and len(sides) == 4


def default_batch(scratch: int) -> int:
    """Return the largest usual batch whose scratch memory is usual, too: not what happens to be free at a build."""
    return max(1, min(USUAL_BATCH, USUAL_SCRATCH // max(scratch, 1)))


def check_room(bundle: Bundle, weights: int, scratch: int, max_batch: int, free_bytes: int | None) -> None:
    """Refuse what cannot fit before the long work begins.

    The disk must hold the engine, which is about as large as its ``weights``; the GPU the weights twice, as built and
    as tried, and the ``scratch`` memory of ``max_batch`` images. Raises EngineUnavailableError with the numbers and a
    way out.
    """
    disk = shutil.disk_usage(bundle.folder).free
    if disk < weights:
        raise EngineUnavailableError(
            f"{bundle.folder}: an engine of about {shown_bytes(weights)} does not fit on this disk, which has "
            f"{shown_bytes(disk)} free. Make room, or copy the bundle to another disk."
        )
    needed = 2 * weights + max_batch * scratch
    if free_bytes is not None and free_bytes < needed:
        fitting = (free_bytes - 2 * weights) // max(scratch, 1)
        smaller = f"try --max-batch {fitting}" if fitting >= 1 else "use a GPU with more, or --precision fp16"
        raise EngineUnavailableError(
            f"the build needs about {shown_bytes(needed)} of GPU memory at --max-batch {max_batch}, and "
            f"{shown_bytes(free_bytes)} are free. Close what else uses the GPU, or {smaller}."
        )


def stored_bytes(bundle: Bundle, source: GuardFile, *, halved: bool) -> int:
    """Return the size of a file's weights, of which a builder may make float16 itself."""
    stored = source.bytes + sum(file.bytes for file in bundle.files("onnx_data") if file.path == f"{source.path}.data")
    return stored // 2 if halved else stored
