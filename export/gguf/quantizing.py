"""Let llama.cpp quantize a GGUF file of 16 bits, with an importance matrix where there is one."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from export.gguf.writing import GgufTensor, gguf_library
from runtimes.language.llamacpp import last_error, llama_libraries, recent_lines
from safevlm.errors import CheckpointError, InputError, SafeVLMError
from safevlm.machine import core_count

__all__ = [
    "PLAIN_TYPES",
    "TYPES",
    "UnfitTensorError",
    "check_widths",
    "file_type",
    "needs_importance",
    "quantize_file",
    "type_of",
]

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
TENSOR_LINE = re.compile(r"\[ *\d+/ *\d+\] (\S+)")
"""What llama.cpp's quantizer logs of a tensor that it begins."""
OUT_OF_RANGE = "validation failed"
ROWS_AT_ONCE = 1024
LARGEST = 127 * 65504.0
"""The most that q8_0 holds; far beyond it llama.cpp's other quantizers overflow unseen, or end the process."""
BUFFER_BYTES = 256 * 2**20
"""Of tensor rows that llama.cpp keeps in memory at once."""


def type_of(text: str) -> str:
    """Return a type's name as it stands in :data:`TYPES`. Raises InputError, with what is allowed."""
    name = text.lower()
    if name not in TYPES:
        raise InputError(f"--type {text} is unknown. Allowed: {', '.join(TYPES)}.")
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
                f"--type {name}: '{tensor.source}' has {tensor.shape[-1]} columns, not a multiple of {block}. "
                f"Types that fit: {', '.join(fitting)}."
            )


class UnfitTensorError(CheckpointError):
    """A quantized type does not hold the numbers of one of the checkpoint's tensors."""


def quantize_file(
    source: Path,
    target: Path,
    name: str,
    importance: Mapping[str, npt.NDArray[np.float32]] | None = None,
    sources: Mapping[str, str] | None = None,
    largest: Mapping[str, float] | None = None,
) -> None:
    """Write ``target`` in type ``name`` from a GGUF file; ``importance`` has a number a column, by tensor name.

    ``sources`` are the checkpoint's names of the file's matrices, ``largest`` the largest magnitude in each.

    Raises UnfitTensorError for a tensor whose numbers the type does not hold; SafeVLMError with llama.cpp's own words.
    """
    sources = sources or {}
    for tensor, number in (largest or {}).items():
        if tensor in sources and number > LARGEST:
            raise _unfit(tensor, name, sources, f"up to {number:.4g}, beyond its range")
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
        begun = [found[1] for line in recent_lines() if (found := TENSOR_LINE.match(line))]
        if begun and OUT_OF_RANGE in last_error():
            raise _unfit(begun[-1], name, sources, "beyond its range")
        raise SafeVLMError(f"llama.cpp could not quantize {source.name} to {name}: {last_error()}")
    for tensor in _vanished(source, target):
        raise _unfit(tensor, name, sources, "all so small that they become 0")


def _unfit(tensor: str, name: str, sources: Mapping[str, str], why: str) -> UnfitTensorError:
    return UnfitTensorError(
        f"tensor '{sources.get(tensor, tensor)}' holds numbers that --type {name} cannot represent: they are {why}."
    )


def _vanished(source: Path, target: Path) -> Iterator[str]:
    """Yield the tensors of ``target`` whose row of the largest number is all 0, and is not in ``source``."""
    gguf = gguf_library()
    plain = {tensor.name: tensor for tensor in gguf.GGUFReader(source).tensors}
    for tensor in gguf.GGUFReader(target).tensors:
        before = plain[tensor.name]
        if tensor.tensor_type == before.tensor_type or len(tensor.shape) < 2:
            continue
        at = _largest_row(before.data)
        kept = [gguf.quants.dequantize(each.data[at][None], each.tensor_type) for each in (before, tensor)]
        if np.any(kept[0]) and not np.any(kept[1]):
            yield tensor.name


def _largest_row(rows: npt.NDArray[Any]) -> int:
    """Return which row of floats (bfloat16 as bytes) holds the largest: by their bits, which grow with magnitude."""
    wide = rows.dtype == np.float32
    bits: npt.NDArray[Any] = rows.view(np.uint32 if wide else np.uint16)
    magnitude = 0x7FFFFFFF if wide else 0x7FFF
    peaks = [(bits[at : at + ROWS_AT_ONCE] & magnitude).max(axis=1) for at in range(0, len(bits), ROWS_AT_ONCE)]
    return int(np.concatenate(peaks).argmax())


def file_type(name: str) -> int:
    """Return llama.cpp's number of a type, which files state, too."""
    members = gguf_library().LlamaFileType.__members__
    return int(members["ALL_F32" if name == "f32" else f"MOSTLY_{name.upper()}"])
