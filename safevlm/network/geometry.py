"""What a vision path asks of an image: its size, its layout, how many tokens it becomes.

Shapes: N images, H × W pixels, T image tokens.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from safevlm.errors import InputError
from safevlm.network.qwen_grid import flatten_patches, grid_thw

__all__ = ["QwenGeometry", "SquareGeometry", "VisionGeometry"]


class VisionGeometry(Protocol):
    """The questions of a vision path, answered for one config."""

    def check_size(self, height: int, width: int) -> None:
        """Raise InputError when images of this size cannot be read."""

    def tokens(self, height: int, width: int) -> int:
        """Return T for images of this size; InputError when they cannot be read."""

    def inputs(self, pixels_NCHW: Tensor) -> dict[str, Tensor]:
        """Return the arguments of transformers' ``get_image_features`` for normalised pixels."""


class SquareGeometry:
    """CLIP and SigLIP: one square size, pixels as they are."""

    def __init__(self, size: int, tokens: int) -> None:
        self._size = size
        self._tokens = tokens

    def check_size(self, height: int, width: int) -> None:
        if (height, width) != (self._size, self._size):
            raise InputError(
                f"images are {height}x{width} pixels; this vision tower reads {self._size}x{self._size}. Resize them "
                "with the checkpoint's Preprocessing."
            )

    def tokens(self, height: int, width: int) -> int:
        self.check_size(height, width)
        return self._tokens

    def inputs(self, pixels_NCHW: Tensor) -> dict[str, Tensor]:
        return {"pixel_values": pixels_NCHW}


class QwenGeometry:
    """Qwen2.5-VL: any size in whole image tokens, pixels cut into patches."""

    def __init__(self, patch_size: int, merge_size: int, temporal_patch_size: int) -> None:
        self._patch = {
            "patch_size": patch_size,
            "merge_size": merge_size,
            "temporal_patch_size": temporal_patch_size,
        }
        self._side = patch_size * merge_size

    def check_size(self, height: int, width: int) -> None:
        if height < 1 or width < 1 or height % self._side or width % self._side:
            raise InputError(
                f"images are {height}x{width} pixels; this vision tower reads multiples of {self._side} in both "
                "directions. Resize them with the checkpoint's Preprocessing."
            )

    def tokens(self, height: int, width: int) -> int:
        self.check_size(height, width)
        return (height // self._side) * (width // self._side)

    def inputs(self, pixels_NCHW: Tensor) -> dict[str, Tensor]:
        n, _, height, width = pixels_NCHW.shape
        grid = grid_thw(n, height, width, self._patch["patch_size"]).to(pixels_NCHW.device)
        return {"pixel_values": flatten_patches(pixels_NCHW, **self._patch), "image_grid_thw": grid}
