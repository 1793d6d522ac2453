"""The families that llama.cpp knows, one table in a file of its own."""

from __future__ import annotations

from export.gguf.families.family import GgufFamily
from export.gguf.families.gemma3 import GEMMA3
from export.gguf.families.llava import LLAVA
from export.gguf.families.qwen2_5_vl import QWEN2_5_VL
from safevlm.checkpoint.checkpoint import Checkpoint
from safevlm.errors import InputError

__all__ = ["GGUF_FAMILIES", "gguf_family_of"]

GGUF_FAMILIES: dict[str, GgufFamily] = {"llava": LLAVA, "qwen2_5_vl": QWEN2_5_VL, "gemma3": GEMMA3}
"""By the families' keys."""


def gguf_family_of(checkpoint: Checkpoint) -> GgufFamily:
    """Return what llama.cpp asks of a checkpoint's family.

    Raises:
        InputError: for a family that has no table here.
    """
    found = GGUF_FAMILIES.get(checkpoint.family.key)
    if found is None:
        raise InputError(
            f"{checkpoint.name}: {checkpoint.family.title} cannot be exported as GGUF; "
            f"{', '.join(GGUF_FAMILIES)} can. Use python -m export.onnx for its guard."
        )
    return found
