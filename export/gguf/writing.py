"""Write a GGUF file one tensor at a time, through the ``gguf`` library.

Format: ggml's docs/gguf.md. Shapes are numpy's, outermost first; GGUF itself counts from the innermost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from safevlm.errors import CheckpointError, MissingExtraError

__all__ = ["GgufTensor", "StoredType", "check_numbers", "gguf_library", "write_gguf"]

StoredType = Literal["f32", "f16", "bf16"]
ITEM_BYTES: dict[StoredType, int] = {"f32": 4, "f16": 2, "bf16": 2}
DTYPES: dict[StoredType, torch.dtype] = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_WIDER = {
    torch.float16: "Use --type bf16 or f32; for a tensor of the vision tower or projector --mmproj-type bf16 or f32.",
    torch.bfloat16: "Use --type f32; for a tensor of the vision tower or projector --mmproj-type f32.",
    torch.float32: "No GGUF type can represent it. Use another checkpoint.",
}


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """A tensor to write: its name in the file, its shape, how it is stored, and its numbers when their turn comes.

    ``source`` is what the checkpoint calls it, for errors.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    type: StoredType
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return int(np.prod(self.shape)) * ITEM_BYTES[self.type]


def gguf_library() -> Any:
    """Return the ``gguf`` package. Raises MissingExtraError."""
    try:
        return import_module("gguf")
    except ImportError as error:
        raise MissingExtraError("gguf", "gguf", "writing GGUF files") from error


def write_gguf(
    path: Path,
    architecture: str,
    set_keys: Callable[[Any], None],
    tensors: Sequence[GgufTensor],
    report: Callable[[str], None] = lambda _: None,
) -> dict[str, float]:
    """Write a file and return the largest magnitude in every tensor. One tensor is in memory at a time.

    ``set_keys`` is given the library's writer for the metadata.

    Raises CheckpointError for a number that its type cannot hold, with the checkpoint's name of the tensor; OSError.
    """
    gguf = gguf_library()
    types = {"f32": gguf.GGMLQuantizationType.F32, "f16": gguf.GGMLQuantizationType.F16}
    writer, largest = gguf.GGUFWriter(path, architecture), {}
    try:
        set_keys(writer)
        for tensor in tensors:
            stored = types.get(tensor.type, gguf.GGMLQuantizationType.BF16)
            # the dtype is of no weight beside raw_dtype, but for uint8, which would be taken for packed blocks
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for number, tensor in enumerate(tensors, 1):
            report(f"writing {path.name}: tensor {number} of {len(tensors)}")
            numbers, largest[tensor.name] = _numbers(tensor)
            writer.write_tensor_data(numbers)
    finally:
        writer.close()
    return largest


def _numbers(tensor: GgufTensor) -> tuple[np.ndarray[Any, Any], float]:
    """Return a tensor's numbers as they are stored (bfloat16, which numpy lacks, as its 16 bits) and the largest."""
    value = tensor.read()
    if tuple(value.shape) != tensor.shape:
        raise CheckpointError(f"'{tensor.source}': shape {tuple(value.shape)} was read, {tensor.shape} was announced.")
    dtype = DTYPES[tensor.type]
    largest = check_numbers(value, dtype, tensor.source)
    stored = value.to(dtype).contiguous()
    return (stored.view(torch.int16) if dtype == torch.bfloat16 else stored).numpy(), largest


def check_numbers(value: Tensor, dtype: torch.dtype, source: str) -> float:
    """Check that ``dtype`` holds the numbers of a tensor that the checkpoint calls ``source``; return the largest.

    Raises:
        CheckpointError: for NaN, infinity, a number beyond the range of ``dtype``, and a tensor that becomes all zero.
    """
    if not value.numel():
        return 0.0
    low, high = (float(end) for end in torch.aminmax(value))
    largest = max(-low, high)
    if not math.isfinite(largest):
        raise CheckpointError(
            f"tensor '{source}' holds {'NaN' if math.isnan(largest) else 'infinity'}; only finite numbers are allowed. "
            "The file is damaged, or training diverged: fetch it again, or take another checkpoint."
        )
    kept = float(torch.tensor(largest, dtype=torch.float64).to(dtype))
    name = str(dtype).removeprefix("torch.")
    if not math.isfinite(kept):
        raise CheckpointError(
            f"tensor '{source}' holds {largest:.4g}, beyond {name}'s maximum of {torch.finfo(dtype).max:.5g}. "
            f"{_WIDER[dtype]}"
        )
    if largest and not kept:
        raise CheckpointError(
            f"tensor '{source}' holds numbers up to {largest:.4g}, which are all 0 in {name}. {_WIDER[dtype]}"
        )
    return largest
