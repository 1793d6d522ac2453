"""Let llama.cpp quantize a GGUF file of 16 bits, with an importance matrix where there is one."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from export.gguf.writing import GgufTensor, gguf_library
from models.errors import InputError, SafeVLMError
from models.machine import core_count
from runtimes.llamacpp import last_error, llama_libraries

__all__ = ["PLAIN_TYPES", "TYPES", "check_widths", "needs_importance", "quantize_file", "type_of"]

PLAIN_TYPES = ("f32", "f16", "bf16")
TYPES = (
    *PLAIN_TYPES,
    "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k_m", "q4_k_s", "q4_1", "q4_0", "iq4_nl", "iq4_xs",
    "q3_k_l", "q3_k_m", "q3_k_s", "iq3_m", "iq3_s", "iq3_xs", "iq3_xxs", "q2_k", "q2_k_s", "iq2_m", "iq2_s", "iq2_xs",
    "iq2_xxs", "iq1_m", "iq1_s",
)  # fmt: skip
"""llama.cpp's names of file types, in lower case, from many bits to few."""
WITHOUT_IMPORTANCE_NOTHING = ("q2_k_s", "iq3_xxs", "iq2_m", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s")
"""Types that llama.cpp refuses without an importance matrix."""
BUFFER_BYTES = 256 * 2**20
"""Of tensor rows that llama.cpp keeps in memory at once."""


def type_of(text: str) -> str:
    """Return a type's name as it stands in :data:`TYPES`. Errors: InputError, with what is allowed."""
    name = text.lower()
    if name not in TYPES:
        raise InputError(f"--type {text}: no such type; allowed: {', '.join(TYPES)}.")
    return name


def needs_importance(name: str) -> bool:
    """Say whether llama.cpp refuses a type without an importance matrix."""
    return name in WITHOUT_IMPORTANCE_NOTHING


def block_width(name: str) -> int:
    """Return how many columns a type packs together: 256 for k- and i-quants, 32 for the older ones, 1 for floats."""
    if name in PLAIN_TYPES:
        return 1
    return 32 if name in ("q8_0", "q5_0", "q5_1", "q4_0", "q4_1", "iq4_nl") else 256


def check_widths(tensors: Sequence[GgufTensor], name: str) -> None:
    """Raise InputError, with the tensor and what would fit, where a matrix's width is no multiple of the type's block.

    llama.cpp itself takes another type for such a tensor and goes on.
    """
    block = block_width(name)
    for tensor in tensors:
        if len(tensor.shape) > 1 and tensor.shape[-1] % block:
            fitting = [each for each in TYPES if tensor.shape[-1] % block_width(each) == 0]
            raise InputError(
                f"--type {name}: '{tensor.name}' has {tensor.shape[-1]} columns, which is no multiple of {block}; what "
                f"fits: {', '.join(fitting)}."
            )


def quantize_file(
    source: Path, target: Path, name: str, importance: Mapping[str, npt.NDArray[np.float32]] | None = None
) -> None:
    """Write ``target`` in type ``name`` from a GGUF file; ``importance`` has a number a column, by tensor name.

    Errors: SafeVLMError with llama.cpp's own words.
    """
    llama, _ = llama_libraries()
    parameters = llama.llama_model_quantize_params()
    defaults = llama.llama_model_quantize_default_params()
    ctypes.memmove(ctypes.byref(parameters), ctypes.byref(defaults), ctypes.sizeof(parameters))
    parameters.ftype = file_type(name)
    parameters.nthread = core_count()
    parameters.max_buf_size = BUFFER_BYTES
    kept: list[Any] = []
    if importance:
        table = (llama.llama_model_imatrix_data * (len(importance) + 1))()  # ends with an empty entry
        for entry, (tensor, values) in zip(table, importance.items(), strict=False):
            numbers = np.ascontiguousarray(values, np.float32)
            kept.append(numbers)
            entry.name = tensor.encode()
            entry.data = numbers.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            entry.size = numbers.size
        parameters.imatrix = table
    if llama.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters)) != 0:
        raise SafeVLMError(f"llama.cpp could not quantize {source.name} to {name}: {last_error()}")


def file_type(name: str) -> int:
    """Return llama.cpp's number of a type, which files state, too."""
    members = gguf_library().LlamaFileType.__members__
    return int(members["ALL_F32" if name == "f32" else f"MOSTLY_{name.upper()}"])
