"""The families, each one table in a file of its own."""

from __future__ import annotations

from safevlm.checkpoint.families.gemma3 import GEMMA3
from safevlm.checkpoint.families.llava import LLAVA
from safevlm.checkpoint.families.qwen2_5_vl import QWEN2_5_VL
from safevlm.checkpoint.family import Family

__all__ = ["FAMILIES", "GEMMA3", "LLAVA", "QWEN2_5_VL"]

FAMILIES: dict[str, Family] = {family.key: family for family in (LLAVA, QWEN2_5_VL, GEMMA3)}
