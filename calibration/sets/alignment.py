"""Lay thumbnails over others that show a little more or less of the same picture, and see what agrees.

Up to ``MOST_CUT`` is cut off each side, of either. The cut and the change of brightness and contrast are found by
Gauss-Newton on luminance, from coarse to fine (Lucas and Kanade, “An iterative image registration technique”, 1981),
with little weight on what does not fit, such as a line of text. All pairs are aligned at once.

Shapes: N pairs, S × S pixels, C colours, P parameters. Coordinates run from -1 to 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Agreement", "agreements", "luminance"]

SIZES = (16, 32, 64)
STEPS = 5
"""Sides of the thumbnails that are aligned, in pixels, and steps at each."""
HOPEFUL = 0.6
"""Correlation from which a pair that is aligned coarsely is looked at more finely."""
MOST_CUT = 0.08
LARGEST_STEP = 0.1
STEADINESS = 1e-3
"""Ridge of the normal equations, as a share of their mean diagonal: plain grounds do not say where they lie."""
OUTLIER = 0.25
"""Share of the contrast by which a pixel may miss before it counts less: shapes that have moved are no outliers."""
BLOCK = 8
"""Side of the blocks that agree or not, in pixels."""
TEXTURED = 4.0
"""Contrast (standard deviation, levels of 255) from which a block shows anything."""
ALIKE = 0.85
"""Correlation from which two blocks agree."""
_LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)

Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What two aligned thumbnails have in common where they overlap.

    ``correlation`` is that of luminance, ``colours`` that of red, green and blue together, ``blocks`` the share of
    textured blocks that agree, ``textured`` the share of blocks that are textured, ``rms`` the colours' root mean
    square difference and ``contrast`` their lower standard deviation, both in levels of 255. ``cut`` is the largest
    share cut off a side.
    """

    correlation: float
    colours: float
    blocks: float
    textured: float
    rms: float
    contrast: float
    cut: float


def luminance(pixels: Pixels | Floats) -> Floats:
    """Return the luminance of RGB pixels, whatever the axes before the colours."""
    return np.asarray(pixels.astype(np.float32) @ _LUMINANCE)


def agreements(ones_NSSC: Pixels, others_NSSC: Pixels) -> list[Agreement | None]:
    """Align pairs of 64 × 64 RGB thumbnails and compare them; ``None`` for a pair with little in common coarsely."""
    found: list[Agreement | None] = [None] * len(ones_NSSC)
    numbers: NDArray[np.int64] = np.arange(len(ones_NSSC), dtype=np.int64)
    cuts: NDArray[np.float64] = np.zeros((len(numbers), 4))
    ones, others = luminance(ones_NSSC), luminance(others_NSSC)
    for size in SIZES:
        if not len(numbers):
            break
        sources, targets = _shrunk(ones[numbers], size), _shrunk(others[numbers], size)
        for _ in range(STEPS):
            cuts = _within(cuts + _step(sources, targets, cuts))
        laid, inside = _laid(sources, cuts)
        hopeful = _correlations(laid, targets, inside) >= HOPEFUL
        numbers, cuts = numbers[hopeful], cuts[hopeful]
    for number, cut in zip(numbers, cuts, strict=True):
        found[number] = _compare(ones_NSSC[number], others_NSSC[number], cut)
    return found


def _within(cuts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Bound scales and shifts so that no more than ``MOST_CUT`` of a side is outside."""
    scales, shifts = cuts[:, ::2], cuts[:, 1::2]
    scales = np.clip(scales, -2 * MOST_CUT, 2 * MOST_CUT)
    room = 2 * MOST_CUT - np.abs(scales)
    return np.stack([scales, np.clip(shifts, -room, room)], axis=-1).reshape(len(cuts), 4)


def _step(sources_NSS: Floats, targets_NSS: Floats, cuts_N4: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the changes of the cuts that bring sources nearest targets, contrast and brightness free."""
    count, size = sources_NSS.shape[:2]
    laid, inside = _laid(sources_NSS, cuts_N4)
    down, across = (gradient * (size / 2) for gradient in np.gradient(laid, axis=(1, 2)))
    place = _places(size)
    terms_NPK = np.stack(
        [across * place, across, down * place[:, None], down, laid, np.ones_like(laid)], axis=1
    ).reshape(count, 6, size * size)
    wanted_NK = targets_NSS.reshape(count, size * size)
    weights = inside.reshape(count, size * size) * _trust(laid.reshape(count, -1), wanted_NK)
    weighted = terms_NPK * weights[:, None]
    normal = weighted @ terms_NPK.swapaxes(1, 2)
    sides = np.arange(4)
    normal[:, sides, sides] += STEADINESS * normal[:, sides, sides].mean(axis=1, keepdims=True)
    normal += np.eye(6, dtype=np.float32) * np.float32(1e-2)
    solved = np.linalg.solve(normal.astype(np.float64), (weighted @ wanted_NK[..., None]).astype(np.float64))[..., 0]
    gain = solved[:, 4:5]
    change = np.divide(solved[:, :4], gain, out=np.zeros((count, 4)), where=gain > LARGEST_STEP)
    return np.clip(change, -LARGEST_STEP, LARGEST_STEP)


def _trust(sources_NK: Floats, targets_NK: Floats) -> Floats:
    """Return weights that are small where targets are far from a line through sources."""
    centred = sources_NK - sources_NK.mean(axis=1, keepdims=True)
    wanted = targets_NK - targets_NK.mean(axis=1, keepdims=True)
    gain = (centred * wanted).sum(axis=1, keepdims=True) / ((centred**2).sum(axis=1, keepdims=True) + 1)
    missed = np.abs(wanted - gain * centred)
    usual = 1.5 * np.median(missed, axis=1, keepdims=True) + OUTLIER * wanted.std(axis=1, keepdims=True) + 1
    return np.asarray(1 / (1 + (missed / usual) ** 2), np.float32)


def _laid(sources_NSS: Floats, cuts_N4: NDArray[np.float64]) -> tuple[Floats, Mask]:
    """Return sources as their cuts show them, and where these are inside."""
    columns, rows = _lines(sources_NSS.shape[1], cuts_N4[:, :2]), _lines(sources_NSS.shape[1], cuts_N4[:, 2:])
    inside = (rows.sum(axis=2) > 0)[:, :, None] & (columns.sum(axis=2) > 0)[:, None]
    return np.asarray(rows @ sources_NSS @ columns.swapaxes(1, 2), np.float32), inside


def _places(size: int) -> Floats:
    """Return the pixels' middles from -1 to 1."""
    return (np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(2 / size) - 1


def _lines(size: int, cuts_N2: NDArray[np.float64]) -> Floats:
    """Return the matrices that interpolate lines of pixels where cuts put them; rows outside are 0."""
    scale, shift = cuts_N2[:, :1], cuts_N2[:, 1:]
    middle = (_places(size) * (1 + scale) + shift + 1) * (size / 2) - 0.5
    outside = (middle < -0.5) | (middle > size - 0.5)
    middle = np.clip(middle, 0, size - 1)
    matrices = np.clip(1 - np.abs(middle[..., None] - np.arange(size)), 0, None)
    matrices[outside] = 0
    return matrices.astype(np.float32)


def _shrunk(pictures_NSS: Floats, size: int) -> Floats:
    count, side = pictures_NSS.shape[:2]
    factor = side // size
    return np.asarray(pictures_NSS.reshape(count, size, factor, size, factor).mean(axis=(2, 4)))


def _correlations(ones_NSS: Floats, others_NSS: Floats, inside_NSS: Mask) -> Floats:
    area = inside_NSS.sum(axis=(1, 2), keepdims=True)
    ones, others = (
        np.where(inside_NSS, pixels - (pixels * inside_NSS).sum(axis=(1, 2), keepdims=True) / area, 0)
        for pixels in (ones_NSS, others_NSS)
    )
    norms = np.sqrt((ones**2).sum(axis=(1, 2)) * (others**2).sum(axis=(1, 2)))
    return np.asarray((ones * others).sum(axis=(1, 2)) / (norms + 1e-6), np.float32)


def _compare(one_SSC: Pixels, other_SSC: Pixels, cut_4: NDArray[np.float64]) -> Agreement:
    layers = one_SSC.astype(np.float32).transpose(2, 0, 1)
    laid, inside = _laid(layers, np.tile(cut_4, (len(layers), 1)))
    colours, wanted = laid.transpose(1, 2, 0), other_SSC.astype(np.float32)
    one, other = luminance(colours), luminance(wanted)
    shown = inside[0]
    blocks, textured = _blocks(one, other, shown)
    return Agreement(
        correlation=float(_correlations(one[None], other[None], inside[:1])[0]),
        colours=float(np.corrcoef(colours[shown].reshape(-1), wanted[shown].reshape(-1))[0, 1]),
        blocks=blocks,
        textured=textured,
        rms=float(np.sqrt(np.mean(_halved((colours - wanted) * shown[..., None]) ** 2) / shown.mean())),
        contrast=float(min(colours[shown].std(), wanted[shown].std())),
        cut=float(max(np.abs(cut_4[:2]).sum(), np.abs(cut_4[2:]).sum()) / 2),
    )


def _halved(pixels_SSC: Floats) -> Floats:
    """Return means of 2 × 2 pixels: interpolation has blurred one of two thumbnails."""
    return _shrunk(pixels_SSC.transpose(2, 0, 1), len(pixels_SSC) // 2)


def _blocks(one_SS: Floats, other_SS: Floats, inside_SS: Mask) -> tuple[float, float]:
    """Return the share of textured blocks that agree, and the share of blocks that are textured in either."""
    whole = _in_blocks(inside_SS).all(axis=1)
    one, other = (_in_blocks(picture)[whole] for picture in (one_SS, other_SS))
    one, other = (block - block.mean(axis=1, keepdims=True) for block in (one, other))
    spreads = np.sqrt(np.stack([(one**2).mean(axis=1), (other**2).mean(axis=1)]))
    textured = spreads.max(axis=0) >= TEXTURED
    if not textured.any():
        return 0.0, 0.0
    alike = (one * other).mean(axis=1) >= ALIKE * spreads[0] * spreads[1]
    return float((alike & (spreads.min(axis=0) > 0))[textured].mean()), float(textured.mean())


def _in_blocks(picture_SS: NDArray[np.generic]) -> NDArray[np.generic]:
    side = len(picture_SS) // BLOCK
    return picture_SS.reshape(side, BLOCK, side, BLOCK).swapaxes(1, 2).reshape(side * side, BLOCK * BLOCK)
