"""Write a GGUF file one tensor at a time, through the ``gguf`` library.

Format: ggml's docs/gguf.md. Shapes are numpy's, outermost first; GGUF itself counts from the innermost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from models.errors import CheckpointError, MissingExtraError

__all__ = ["GgufTensor", "StoredType", "gguf_library", "write_gguf"]

StoredType = Literal["f32", "f16", "bf16"]
ITEM_BYTES: dict[StoredType, int] = {"f32": 4, "f16": 2, "bf16": 2}
FLOAT16_MAX = 65504.0


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """A tensor to write: its name in the file, its shape, how it is stored, and its numbers when their turn comes."""

    name: str
    shape: tuple[int, ...]
    type: StoredType
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return int(np.prod(self.shape)) * ITEM_BYTES[self.type]


def gguf_library() -> Any:
    """Return the ``gguf`` package. Errors: MissingExtraError."""
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
) -> None:
    """Write a file; ``set_keys`` is given the library's writer for the metadata. One tensor is in memory at a time.

    Errors: CheckpointError for a number that its type cannot hold, with the tensor's name; OSError.
    """
    gguf = gguf_library()
    types = {"f32": gguf.GGMLQuantizationType.F32, "f16": gguf.GGMLQuantizationType.F16}
    writer = gguf.GGUFWriter(path, architecture)
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
            writer.write_tensor_data(_numbers(tensor))
    finally:
        writer.close()


def _numbers(tensor: GgufTensor) -> np.ndarray[Any, Any]:
    """Return a tensor's numbers as they are stored; bfloat16, which numpy lacks, as its 16 bits."""
    value = tensor.read()
    if tuple(value.shape) != tensor.shape:
        raise CheckpointError(f"'{tensor.name}': shape {tuple(value.shape)} was read, {tensor.shape} was announced.")
    if tensor.type == "bf16":
        return value.to(torch.bfloat16).contiguous().view(torch.int16).numpy()
    if tensor.type == "f32":
        return value.to(torch.float32).contiguous().numpy()
    if value.dtype != torch.float16:
        largest = float(value.abs().max()) if value.numel() else 0.0
        if not largest <= FLOAT16_MAX:
            raise CheckpointError(
                f"'{tensor.name}' holds {largest:.4g}, float16 ends at {FLOAT16_MAX:g}. Take --type bf16, or a "
                "quantized type, which is made from bfloat16."
            )
    return value.to(torch.float16).contiguous().numpy()
