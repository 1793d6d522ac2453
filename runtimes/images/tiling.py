"""How a guard looks at a large image: as a whole, and in tiles where its view would shrink it too much.

``tiles``: where the guard's preprocessing shrinks an image more than twofold in either direction, or crops some of it
away, the whole is judged and overlapping tiles of it, nine at most; an image that nine tiles cannot hold is shrunk
until they can. ``judged``: nothing but the guard's own view is shown. ``whole``: the image is shown in full whatever
the guard sees of it.

Every tile is a frame of the guard's own proportions, between its size and twice that, so that nothing in it is
distorted or shrunk more than twofold; the finest frames that nine hold are taken. Where the image is narrower than a
frame, the rest is filled with the mean colour. Frames overlap by a third: an object of up to a third of a frame's width
and height is whole in one of them, wherever it stands (of a square image that is a seventh of its side). More overlap
would leave less for each tile to see, for there are nine: half finds fewer of the unsafe images that are pasted into
large ones.

Legend: pixels are (width, height) as in Pillow; ``W x H`` is the guard's size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from math import ceil
from typing import get_args

import numpy as np
import numpy.typing as npt
from PIL import Image

from safevlm.contract.manifest_fields import ViewMode
from safevlm.contract.preprocessing import Preprocessing
from safevlm.errors import InputError

__all__ = ["MOST_SHRUNK", "MOST_TILES", "Tiles", "ViewMode", "checked_mode", "judged_pixels", "shown", "tiles_of"]

Box = tuple[int, int, int, int]

MOST_SHRUNK = 2
"""So many pixels of what is shown become one of the guard's, in either direction, at most."""
MOST_TILES = 9
OVERLAP = Fraction(1, 3)
"""Of two frames beside each other, at least."""
GRIDS = tuple((across, MOST_TILES // across) for across in range(1, MOST_TILES + 1))
"""Columns and rows of the tiles that an image may have."""


@dataclass(frozen=True)
class Tiles:
    """Where the tiles of an image lie: frames of one size, from the left and from the top; some may reach beyond it."""

    size: tuple[int, int]
    """Of the image that is shown."""
    frame: tuple[int, int]
    boxes: tuple[Box, ...]
    """Left, top, right and bottom of each tile, within the image; the rest of its frame is empty."""


def checked_mode(mode: ViewMode) -> ViewMode:
    """Return a mode as it was given. Raises InputError for another word."""
    if mode not in get_args(ViewMode):
        raise InputError(f"view {mode!r} is unknown. Allowed: {', '.join(get_args(ViewMode))}.")
    return mode


def shown(image: Image.Image, preprocessing: Preprocessing, mode: ViewMode) -> Image.Image:
    """Return an RGB image at the largest size that may be shown to a language model when it is judged in this mode.

    What is returned may be given again: it comes back as it is.
    """
    if mode == "judged" and not _is_seen_in_full(image.size, preprocessing):
        return Image.fromarray(preprocessing.apply(image))
    if mode == "tiles":
        tiles = tiles_of(image.size, preprocessing)
        if tiles is not None and tiles.size != image.size:
            return image.resize(tiles.size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    return image


def judged_pixels(
    image: Image.Image, preprocessing: Preprocessing, mode: ViewMode
) -> Iterator[tuple[str, npt.NDArray[np.uint8]]]:
    """Yield what the guard has to judge of an RGB image, uint8 H x W x 3 each: the whole ("") first, then tiles.

    They are those of the image as it is :func:`shown`, which a caller shows and nothing larger.
    """
    image = shown(image, preprocessing, mode)
    if mode == "judged" and image.size == (preprocessing.width, preprocessing.height):
        yield "", np.array(image, dtype=np.uint8)
        return
    yield "", preprocessing.apply(image)
    tiles = tiles_of(image.size, preprocessing) if mode == "tiles" else None
    if tiles is not None:
        for number, box in enumerate(tiles.boxes, 1):
            yield f"tile {number} of {len(tiles.boxes)}", _tile(image, box, tiles.frame, preprocessing)


def tiles_of(size: tuple[int, int], preprocessing: Preprocessing) -> Tiles | None:
    """Return the tiles of an image of a size (width, height), None where the guard's view of the whole is enough."""
    if _is_enough(size, preprocessing):
        return None
    guard = (preprocessing.width, preprocessing.height)
    size = _shrunk(size, guard)
    frame = _frame(size, guard)
    columns, rows = (_starts(length, side) for length, side in zip(size, frame, strict=True))
    boxes = tuple(
        (left, top, min(left + frame[0], size[0]), min(top + frame[1], size[1])) for top, left in product(rows, columns)
    )
    return Tiles(size, frame, boxes)


# -- what the guard sees of the whole -------------------------------------------------------------------------


def _is_cropped(size: tuple[int, int], preprocessing: Preprocessing) -> bool:
    """Say whether preprocessing cuts something of an image away."""
    if preprocessing.shortest_edge is None:
        return False
    width, height = (int(preprocessing.shortest_edge * side / min(size)) for side in size)
    return width > preprocessing.width or height > preprocessing.height


def _is_enough(size: tuple[int, int], preprocessing: Preprocessing) -> bool:
    """Say whether the guard's view of the whole shrinks it at most twofold, and crops nothing."""
    if _is_cropped(size, preprocessing):
        return False
    if preprocessing.shortest_edge is not None:
        return min(size) <= MOST_SHRUNK * preprocessing.shortest_edge
    width, height = size if preprocessing.fit == "squash" else (max(size),) * 2
    return width <= MOST_SHRUNK * preprocessing.width and height <= MOST_SHRUNK * preprocessing.height


def _is_seen_in_full(size: tuple[int, int], preprocessing: Preprocessing) -> bool:
    """Say whether an image is what the guard reads, or smaller and in no part cropped away."""
    guard = (preprocessing.width, preprocessing.height)
    if size == guard:
        return True
    return size[0] <= guard[0] and size[1] <= guard[1] and not _is_cropped(size, preprocessing)


# -- where the tiles lie --------------------------------------------------------------------------------------


def _shrunk(size: tuple[int, int], guard: tuple[int, int]) -> tuple[int, int]:
    """Return the largest size, of the same shape and no larger than the image, that tiles of twice the guard's hold."""
    across, down = (Fraction(MOST_SHRUNK * side, length) for side, length in zip(guard, size, strict=True))
    scale = max(min(across * _reach(columns), down * _reach(rows)) for columns, rows in GRIDS)
    if scale >= 1:
        return size
    return max(1, int(size[0] * scale)), max(1, int(size[1] * scale))


def _frame(size: tuple[int, int], guard: tuple[int, int]) -> tuple[int, int]:
    """Return the finest frame of which nine cover an image; finer than the guard's size only for a narrow image."""
    across, down = (Fraction(length, side) for length, side in zip(size, guard, strict=True))
    finest = min(max(across / _reach(columns), down / _reach(rows)) for columns, rows in GRIDS)
    scale = min(Fraction(MOST_SHRUNK), max(finest, min(Fraction(1), across, down)))
    return ceil(guard[0] * scale), ceil(guard[1] * scale)


def _reach(frames: int) -> Fraction:
    """Return how much, in frames, so many of them cover that overlap as little as they may."""
    return 1 + (frames - 1) * (1 - OVERLAP)


def _starts(length: int, frame: int) -> list[int]:
    """Return where frames begin that cover a length evenly."""
    if length <= frame:
        return [0]
    steps = ceil((length - frame) / (frame * (1 - OVERLAP)))
    return [round(Fraction((length - frame) * at, steps)) for at in range(steps + 1)]


def _tile(image: Image.Image, box: Box, frame: tuple[int, int], preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """Return a tile at the guard's size, its frame resized straight to that: nothing is cropped away."""
    part = image.crop(box)
    if part.size != frame:
        mean = tuple(int(255 * min(1.0, max(0.0, value))) for value in preprocessing.mean)
        canvas = Image.new("RGB", frame, mean)
        canvas.paste(part, ((frame[0] - part.width) // 2, (frame[1] - part.height) // 2))
        part = canvas
    return preprocessing.model_copy(update={"fit": "squash", "shortest_edge": None}).apply(part)
