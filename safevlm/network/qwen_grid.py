"""Cut images into the flat patches that Qwen2.5-VL's vision tower takes, at one grid for the whole batch.

Shapes: N images, C channels, H and W pixels, p patch size, t temporal patch size, m merge size,
P = (H/p)·(W/p) patches an image, of which every m×m neighbours become one of T = P/m² image tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["flatten_patches", "grid_thw"]


def flatten_patches(pixels_NCHW: Tensor, *, patch_size: int, temporal_patch_size: int, merge_size: int) -> Tensor:
    """Return (N·P) × (C·t·p·p) patches, the m×m patches of one image token standing together.

    A still image stands for ``t`` equal frames. ``H`` and ``W`` must be multiples of p·m.

    Source: ``Qwen2VLImageProcessor.patchify`` of transformers, which does the same one image at a time.
    """
    n, channels, height, width = pixels_NCHW.shape
    p, m, t = patch_size, merge_size, temporal_patch_size
    blocks = pixels_NCHW.reshape(n, channels, height // (p * m), m, p, width // (p * m), m, p)
    patches = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7)  # n, block row, block column, m, m, C, p, p
    frames = patches.unsqueeze(6).expand(*patches.shape[:6], t, p, p)
    return frames.reshape(n * (height // p) * (width // p), channels * t * p * p)


def grid_thw(images: int, height: int, width: int, patch_size: int) -> Tensor:
    """Return N × 3: time, rows and columns of patches of still images of ``height`` × ``width`` pixels."""
    return torch.tensor([[1, height // patch_size, width // patch_size]]).expand(images, 3)
