"""The three families, each one table in a file of its own."""

from __future__ import annotations

from models.families.gemma3 import GEMMA3
from models.families.llava import LLAVA
from models.families.qwen2_5_vl import QWEN2_5_VL
from models.family import Family

__all__ = ["FAMILIES", "GEMMA3", "LLAVA", "QWEN2_5_VL"]

FAMILIES: dict[str, Family] = {family.key: family for family in (LLAVA, QWEN2_5_VL, GEMMA3)}
