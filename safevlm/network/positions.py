"""Where the tokens of a prompt stand, as the families' language models count.

Shapes: N prompts of L positions, padding included.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from safevlm.network.qwen_grid import grid_thw

__all__ = ["axial_positions", "text_positions"]


def text_positions(_core: Any, attention_NL: Tensor, _image_NL: Tensor, _size: tuple[int, int]) -> Tensor:
    """Count the positions that are not padding, N × L."""
    return (attention_NL.cumsum(dim=-1) - 1).clamp(min=0)


def axial_positions(core: Any, attention_NL: Tensor, image_NL: Tensor, size: tuple[int, int]) -> Tensor:
    """Return Qwen2.5-VL's positions in time, row and column, 3 × N × L, by transformers' own rule."""
    if not bool(image_NL.any()):
        return text_positions(core, attention_NL, image_NL, size).expand(3, -1, -1)
    grid = grid_thw(len(image_NL), *size, core.config.vision_config.patch_size).to(image_NL.device)
    positions, _ = core.get_rope_index(
        torch.zeros_like(attention_NL), image_NL.int(), image_grid_thw=grid, attention_mask=attention_NL
    )
    return cast(Tensor, positions)
