"""Find an image again among many: saved anew, resized, cropped a little, mirrored, turned, recoloured or padded.

An image is looked for as it is, as its centre square, and without the border that it may have been given; each in all
eight orientations. Candidates are what resembles it coarsely: thumbnails whose *correlation* is at least
``CANDIDATE``, or PDQ hashes that differ in at most ``NEAR`` of 256 bits, both of a quality that can be trusted.
Neither is proof: tiles of one sky and forms of one template have hashes as near as copies have. So candidates are laid
over each other (:mod:`calibration.sets.alignment`), and two are the same image if

- luminance correlates by ``PLAIN_CORRELATED`` and *colours* differ by ``MAX_RMS`` levels of 255 at most (root mean
  square) and by ``MAX_RELATIVE`` of the contrast;
- it does, nearly all *textured blocks* agree, brightness and contrast of each apart, and either nothing was cut off and
  colours correlate, or colours are still near, or such blocks are many (and PDQ says so if much is plain ground);
- most of many textured blocks agree, half of them if PDQ says so as well. This is for photographs, where a line of text
  may lie over the rest, and not for images with much plain ground, such as drawings and forms.

The bounds were measured on holisafe-mini, whose drawn images resemble each other more than photographs do, on
photographs and their tiles, and on forms, charts, chats and typed pages. Not found are images that were cut by more
than 8 % a side, put among others, or turned by other angles.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from calibration.sets.alignment import Agreement, agreements, luminance
from calibration.sets.padding import Box, content_box
from calibration.sets.pdq import BITS, ORIENTATIONS, distances, oriented, pdq_hash

__all__ = ["Match", "PictureIndex", "pixels_sha256"]

COARSE = 16
FINE = 64
"""Sides of the thumbnails that are searched and that are compared, in pixels."""
REDUCED = 512
"""Longest side, in pixels, that an image is reduced to by a whole factor first, as PDQ's authors advise."""
CANDIDATE = 0.8
NEAR = 72
TRUSTED = 50
"""PDQ's quality from which its authors trust a hash."""
MOST_COMPARED = 1024
TOGETHER = 64
"""Candidates that are compared with an image at most, and how many at once, likest first."""
PLAIN_CORRELATED = 0.96
MAX_RMS = 3.2
MAX_RELATIVE = 0.08
PLAIN_BLOCKS = 0.9
FEWEST_TEXTURED = 0.05
UNCUT = 0.015
SAME = 0.98
PLAIN_RMS = 4.0
"""What must hold of drawings: see the list above, in its order. Shapes of one kind lie over each other when cut."""
CORRELATED = 0.85
NEAR_BLOCKS = 0.5
TEXTURED = 0.25
MOST_BLOCKS = 0.75
FAR_TEXTURED = 0.5
"""What must hold of photographs: blocks that agree and that are textured, if PDQ says so as well and otherwise."""
PLAIN = 0.25
PLAIN_LEVELS = 3
"""An image is plain if this share of it is as bright as the commonest brightness, give or take these levels of 255."""
FLATTEST = 2.0
"""Contrast (standard deviation, levels of 255) below which an image resembles none but its own pixels."""
SQUARE = 1.05
"""Ratio of sides up to which an image counts as square."""

Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Match:
    """The item found, by its number, and how: ``pixels`` (identical) or ``picture`` (alike)."""

    item: int
    signal: str
    detail: str


@dataclass(frozen=True, eq=False)
class _View:
    """A part of an image: S × S × 3 thumbnails, PDQ's signs in 8 orientations × 256 bits."""

    part: str
    coarse: Floats
    fine: Pixels
    signs: Floats
    trusted: bool
    plain: bool


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    view: _View
    orientation: int
    number: int
    likeness: float
    distance: int
    near: bool


def pixels_sha256(picture: Image.Image) -> str:
    """Return the SHA-256 of an RGB image's size and pixels: the same for every lossless file of it."""
    width, height = picture.size
    return hashlib.sha256(f"{width}x{height}:".encode() + picture.tobytes()).hexdigest()


class PictureIndex:
    """Pictures to be found again; items are numbered from 0 in the order given."""

    def __init__(self, pictures: Iterable[Image.Image]) -> None:
        self._first: dict[str, int] = {}
        self._items: list[int] = []
        self._views: list[_View] = []
        for item, picture in enumerate(pictures):
            self._first.setdefault(pixels_sha256(picture), item)
            for view in _views(picture):
                self._items.append(item)
                self._views.append(replace(view, signs=view.signs[:1].copy()))  # the other seven are the sample's
        self._coarse_NK = _stacked([view.coarse.reshape(-1) for view in self._views], COARSE * COARSE)
        self._signs_NB = _stacked([view.signs[0] for view in self._views], BITS)
        self._trusted_N = np.array([view.trusted for view in self._views], dtype=bool)

    def __len__(self) -> int:
        return len(self._first)

    def find(self, picture: Image.Image) -> Match | None:
        """Return the likest item that is the same image, or ``None``."""
        identical = self._first.get(pixels_sha256(picture))
        if identical is not None:
            return Match(identical, "pixels", "identical pixels")
        candidates = sorted(self._candidates(picture), key=lambda candidate: -candidate.likeness)[:MOST_COMPARED]
        for start in range(0, len(candidates), TOGETHER):
            found = self._likest(candidates[start : start + TOGETHER])
            if found is not None:
                return found
        return None

    def _candidates(self, picture: Image.Image) -> Iterator[_Candidate]:
        for view in _views(picture):
            turned_OK = np.stack([oriented(view.coarse, number).reshape(-1) for number in range(len(ORIENTATIONS))])
            alike = turned_OK @ self._coarse_NK.T
            apart = distances(view.signs, self._signs_NB)
            near = (apart <= NEAR) & self._trusted_N & view.trusted
            for orientation, number in np.argwhere((alike >= CANDIDATE) | near):
                bits = int(apart[orientation, number])
                likeness = max(float(alike[orientation, number]), 1 - bits / BITS if near[orientation, number] else 0)
                yield _Candidate(
                    view=view,
                    orientation=int(orientation),
                    number=int(number),
                    likeness=likeness,
                    distance=bits,
                    near=bool(near[orientation, number]),
                )

    def _likest(self, candidates: list[_Candidate]) -> Match | None:
        """Return the candidate that is the same image and agrees best, the least changed one first."""
        found = agreements(
            np.stack([oriented(candidate.view.fine, candidate.orientation) for candidate in candidates]),
            np.stack([self._views[candidate.number].fine for candidate in candidates]),
        )
        same = [
            (round(seen.correlation, 3), -candidate.orientation, candidate, seen)
            for candidate, seen in zip(candidates, found, strict=True)
            if seen is not None
            and _is_same(seen, plain=candidate.view.plain or self._views[candidate.number].plain, near=candidate.near)
        ]
        if not same:
            return None
        *_, candidate, seen = max(same, key=lambda one: one[:2])
        detail = _described(candidate, self._views[candidate.number], seen)
        return Match(self._items[candidate.number], "picture", detail)


def _is_same(seen: Agreement, *, plain: bool, near: bool) -> bool:
    """Say whether two aligned thumbnails show the same image; ``near`` is what PDQ says."""
    if seen.correlation < CORRELATED or seen.contrast < FLATTEST:
        return False
    enough = seen.textured >= (TEXTURED if near else FAR_TEXTURED)
    if seen.correlation >= PLAIN_CORRELATED:
        if seen.rms <= min(MAX_RMS, MAX_RELATIVE * seen.contrast):
            return True
        unchanged = seen.cut < UNCUT and seen.colours >= SAME
        many = enough and (near or not plain)
        if seen.blocks >= PLAIN_BLOCKS and seen.textured >= FEWEST_TEXTURED:
            return unchanged or many or seen.rms <= PLAIN_RMS
    return enough and not plain and seen.blocks >= (NEAR_BLOCKS if near else MOST_BLOCKS)


def _described(candidate: _Candidate, view: _View, seen: Agreement) -> str:
    """Say what was done to the image, and how well it agrees."""
    changes = [
        ORIENTATIONS[candidate.orientation],
        *sorted({part for part in (candidate.view.part, view.part) if part}),
        f"cut by {seen.cut:.0%} of a side" if seen.cut >= UNCUT else "",
    ]
    said = ", ".join(change for change in changes if change) or "near copy"
    return f"{said}; correlation {seen.correlation:.3f}, {candidate.distance} of {BITS} bits of PDQ differ"


def _views(picture: Image.Image) -> Iterator[_View]:
    factor = -(-max(picture.size) // REDUCED)
    reduced = picture.reduce(factor) if factor > 1 else picture
    grey_HW = np.asarray(reduced.convert("L"), dtype=np.float32)
    for part, box in _parts(reduced):
        # BILINEAR weighs like a tent over all source pixels; BOX leaves steps at sizes that do not divide
        fine = reduced.resize((FINE, FINE), Image.Resampling.BILINEAR, box=box)
        coarse = reduced.resize((COARSE, COARSE), Image.Resampling.BILINEAR, box=box)
        left, top, right, bottom = box
        hashed = pdq_hash(grey_HW[top:bottom, left:right])
        yield _View(
            part=part,
            coarse=_standardised(luminance(np.asarray(coarse))),
            fine=np.asarray(fine),
            signs=hashed.signs,
            trusted=hashed.quality >= TRUSTED,
            plain=_is_plain(grey_HW[top:bottom, left:right]),
        )


def _parts(picture: Image.Image) -> Iterator[tuple[str, Box]]:
    """Yield a whole image, its centre square if it is not square, and its content if it has a border."""
    width, height = picture.size
    side = min(width, height)
    yield "", (0, 0, width, height)
    if max(width, height) > SQUARE * side:
        left, top = (width - side) // 2, (height - side) // 2
        yield "cut to a square", (left, top, left + side, top + side)
    content = content_box(np.asarray(picture))
    if content is not None:
        yield "with a border", content


def _standardised(pixels: Floats) -> Floats:
    """Return pixels with mean 0 and norm 1 (less for a flat image), so that a dot product is a correlation."""
    pixels = pixels - pixels.mean()
    scale: Any = max(float(pixels.std()), FLATTEST) * np.sqrt(pixels.size)
    return np.asarray(pixels / np.float32(scale), dtype=np.float32)


def _is_plain(grey_HW: Floats) -> bool:
    """Say whether much of an image is a ground of one brightness."""
    counts = np.bincount(grey_HW.astype(np.uint8).reshape(-1), minlength=256)
    window = np.convolve(counts, np.ones(2 * PLAIN_LEVELS + 1))
    return bool(window.max() >= PLAIN * counts.sum())


def _stacked(rows: list[Floats], width: int) -> Floats:
    return np.stack(rows) if rows else np.zeros((0, width), np.float32)
