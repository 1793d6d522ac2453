"""The classes of transformers that compute each family, one table in a file of its own."""

from __future__ import annotations

from typing import Any

from safevlm.imports.left_out import left_out

with left_out("sklearn", "scipy"):
    from transformers.utils.import_utils import is_scipy_available, is_sklearn_available

    # transformers keeps the answers, and loads neither (130 MiB) for assisted decoding and detectors' losses
    is_scipy_available(), is_sklearn_available()

from safevlm.checkpoint.architectures.architecture import Architecture
from safevlm.checkpoint.architectures.gemma3 import GEMMA3
from safevlm.checkpoint.architectures.llava import LLAVA
from safevlm.checkpoint.architectures.qwen2_5_vl import QWEN2_5_VL

__all__ = ["ARCHITECTURES", "Architecture", "architecture_of"]

ARCHITECTURES: dict[str, Architecture] = {"llava": LLAVA, "qwen2_5_vl": QWEN2_5_VL, "gemma3": GEMMA3}
"""Architectures by family key."""


def architecture_of(config: Any) -> Architecture:
    """Return the table of the family whose config this is."""
    return next(each for each in ARCHITECTURES.values() if each.config_class is type(config))
