"""Integers of 2, 3, 4 or 8 bits in int32 words, as GPTQ's first file format (v1) lays them out.

Shapes: R output rows, C input columns, G groups. Words are a stream of bits, lowest first: 32 values fill ``bits``
words, and with 3 bits some values lie across two words. ``qweight`` packs along the columns, ``qzeros`` along the
rows, and the latter holds zero - 1. :mod:`safevlm.checkpoint.weights.quantized` reads them. Source: the files that
AutoGPTQ, GPTQModel and transformers read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantize.methods.grid import Grid
from safevlm.checkpoint.weights.quantized import BITS, WORD
from safevlm.errors import InputError

__all__ = ["check_packable", "pack", "pack_linear"]


def pack(values_NM: Tensor, bits: int) -> Tensor:
    """Pack whole numbers N × M along N into int32 words, (N · bits / 32) × M.

    Raises InputError for values out of range, or N not a multiple of 32.
    """
    count, others = values_NM.shape
    if bits not in BITS or count % WORD:
        raise InputError(f"{count} values of {bits} bits cannot be packed: multiples of {WORD} of {BITS} bits can.")
    values = values_NM.to(torch.int32)
    low, high = values.aminmax()
    if int(low) < 0 or int(high) >= 2**bits:
        raise InputError(f"values from {int(low)} to {int(high)} do not fit {bits} bits.")
    values = values.reshape(count // WORD, WORD, others)
    words = torch.zeros(count // WORD, bits, others, dtype=torch.int32, device=values.device)
    for place in range(WORD):
        word, shift = divmod(place * bits, WORD)
        words[:, word] |= values[:, place] << shift  # what is shifted out belongs to the next word
        if shift + bits > WORD:
            words[:, word + 1] |= values[:, place] >> (WORD - shift)
    return words.reshape(-1, others)


def pack_linear(name: str, ints_RC: Tensor, grid: Grid, group_of_C: Tensor, bits: int) -> dict[str, Tensor]:
    """Return a linear's four tensors by their names: ``name.qweight``, ``.qzeros``, ``.scales``, ``.g_idx``.

    Raises InputError, naming the linear, when R or C is not a multiple of 32.
    """
    check_packable(name, *ints_RC.shape)
    return {
        f"{name}.qweight": pack(ints_RC.T, bits).contiguous(),
        f"{name}.qzeros": pack(grid.zero - 1, bits).T.contiguous(),
        f"{name}.scales": grid.scale.T.to(torch.float16).contiguous(),
        f"{name}.g_idx": group_of_C.to(torch.int32).contiguous(),
    }


def check_packable(name: str, rows: int, columns: int) -> None:
    """Raise InputError, naming the linear, when R or C is not a multiple of 32."""
    if rows % WORD or columns % WORD:
        raise InputError(
            f"{name} has {rows} rows and {columns} columns: GPTQ files hold multiples of {WORD} of both. Leave this "
            "module in 16 bit."
        )
