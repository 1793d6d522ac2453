"""How many images run at once: activations grow with their pixels."""

from __future__ import annotations

__all__ = ["BATCH", "batch_size"]

BATCH = 8
BATCH_PIXELS = 2**20
"""At most so many pixels, where that is one image or more."""


def batch_size(height: int, width: int) -> int:
    """Return how many images of this size run at once."""
    return max(1, min(BATCH, BATCH_PIXELS // (height * width)))
