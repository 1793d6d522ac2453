"""Where a picture lies inside uniform borders: letterboxes and frames of any one colour, a little noisy from JPEG."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["Box", "content_box"]

TOLERANCE = 20
"""Levels of 255 by which a border's pixel may differ from its colour: JPEG's noise."""
UNIFORM = 0.98
"""Share of a line's pixels that must have the border's colour."""
STRAIGHT = 0.7
"""Share of the content's edge that must differ from the border. A shape on a plain ground stays below."""
EDGE = 0.08
"""Depth of that edge as a share of the side: JPEG smears colours over 16 pixels, and dark corners occur."""
BLURRED = 0.01
"""Share of a side that is cut off behind a border, where resizing and JPEG mix both."""
RIM = 0.2
"""Share of each side of the content that is left out when asked whether it shows anything."""
THINNEST = 0.01
SMALLEST = 0.25
"""Shares of a side: the thinnest border that counts, the smallest content."""

Box = tuple[int, int, int, int]
"""Left, top, right and bottom, in pixels."""
Mask = NDArray[np.bool_]


def content_box(pixels_HWC: NDArray[np.uint8]) -> Box | None:
    """Return where the content of a padded picture lies, or ``None`` if nothing was padded.

    Padding is told from the plain ground of a drawing by what lies behind it: the straight edge of a picture.
    """
    height, width = pixels_HWC.shape[:2]
    top, bottom = _between_borders(pixels_HWC)
    if bottom - top < SMALLEST * height:
        return None
    columns_WHC = pixels_HWC.swapaxes(0, 1)
    left, right = _between_borders(columns_WHC[:, top:bottom])
    if right - left < SMALLEST * width or not _straight(columns_WHC[:, top:bottom], left, right):
        left, right = 0, width
    if not _straight(pixels_HWC[:, left:right], top, bottom):
        top, bottom = 0, height
    if max(top, height - bottom) < THINNEST * height and max(left, width - right) < THINNEST * width:
        return None
    if _flat(pixels_HWC[top:bottom, left:right]):
        return None
    across, down = _blurred(right - left), _blurred(bottom - top)
    return (
        left + across * (left > 0),
        top + down * (top > 0),
        right - across * (right < width),
        bottom - down * (bottom < height),
    )


def _flat(content_HWC: NDArray[np.uint8]) -> bool:
    """Say whether content is one colour, its rim apart: a square that was drawn, no picture in a frame."""
    height, width = content_HWC.shape[:2]
    rows, columns = round(height * RIM), round(width * RIM)
    inner = content_HWC[rows : height - rows, columns : width - columns].reshape(-1, 1, content_HWC.shape[2])
    return bool(_differs(inner, np.median(inner, axis=(0, 1)).astype(np.int16)).mean() <= 1 - UNIFORM)


def _between_borders(lines_HWC: NDArray[np.uint8]) -> tuple[int, int]:
    """Return the first line that is not border, and the first that is border again."""
    length = len(lines_HWC)
    first = _border(lines_HWC)
    return (0, length) if first == length else (first, length - _border(lines_HWC[::-1]))


def _border(lines_HWC: NDArray[np.uint8]) -> int:
    """Return how many lines from the first on have one colour."""
    colour = _colour(lines_HWC)
    if not _uniform(lines_HWC[:1], colour).all():
        return 0
    uniform = _uniform(lines_HWC, colour)
    return int(np.argmin(uniform)) if not uniform.all() else len(lines_HWC)


def _uniform(lines_HWC: NDArray[np.uint8], colour: NDArray[np.int16]) -> Mask:
    return np.asarray(_differs(lines_HWC, colour).mean(axis=1) <= 1 - UNIFORM)


def _straight(lines_HWC: NDArray[np.uint8], first: int, end: int) -> bool:
    """Say whether content begins along a straight edge after each border that there is."""
    depth = max(2, round(EDGE * (end - first)))
    edges = []
    if first:
        edges.append(_differs(lines_HWC[first : first + depth], _colour(lines_HWC)))
    if end < len(lines_HWC):
        edges.append(_differs(lines_HWC[end - depth : end], _colour(lines_HWC[::-1])))
    return all(edge.any(axis=0).mean() >= STRAIGHT for edge in edges)


def _blurred(length: int) -> int:
    """Return how many pixels of the content's edge are mixed with the border by resizing and JPEG."""
    return max(1, round(BLURRED * length))


def _colour(lines_HWC: NDArray[np.uint8]) -> NDArray[np.int16]:
    return np.asarray(np.median(lines_HWC[0], axis=0), np.int16)


def _differs(lines_HWC: NDArray[np.uint8], colour: NDArray[np.int16]) -> Mask:
    return np.asarray(np.abs(lines_HWC.astype(np.int16) - colour).max(axis=-1) > TOLERANCE)
