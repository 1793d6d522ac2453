"""Tiles cover all of an image, resolve what is shown of it, and no object up to the stated size is cut everywhere."""

from __future__ import annotations

from importlib import import_module
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from runtimes.images.tiling import MOST_SHRUNK, MOST_TILES, ViewMode, checked_mode, judged_pixels, shown, tiles_of
from safevlm.contract.preprocessing import Preprocessing
from safevlm.errors import InputError

MODES: tuple[ViewMode, ...] = ("tiles", "judged", "whole")
SLOW = settings(deadline=None, derandomize=True, max_examples=200)
SIDES = st.one_of(st.integers(1, 700), st.integers(1, 70_000))


def contract(width: int, height: int, fit: Any = "squash", shortest_edge: int | None = None) -> Preprocessing:
    return Preprocessing(
        height=height,
        width=width,
        fit=fit,
        shortest_edge=shortest_edge,
        filter="bilinear",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )


@st.composite
def contracts(draw: st.DrawFn, most: int = 400) -> Preprocessing:
    width = draw(st.integers(1, most))
    height = draw(st.one_of(st.just(width), st.integers(1, most)))
    fit = draw(st.sampled_from(["squash", "pad", "crop"]))
    return contract(width, height, fit, draw(st.integers(1, most)) if fit == "crop" else None)


def seen(size: tuple[int, int], preprocessing: Preprocessing) -> tuple[float, float, bool]:
    """Return by how much the guard's own view shrinks an image, across and down, and whether it has all of it."""
    width, height = size
    if preprocessing.fit == "crop":
        assert preprocessing.shortest_edge is not None
        by = min(size) / preprocessing.shortest_edge
        fits = int(width / by) <= preprocessing.width and int(height / by) <= preprocessing.height
        return by, by, fits
    if preprocessing.fit == "pad":
        width = height = max(size)
    return width / preprocessing.width, height / preprocessing.height, True


@SLOW
@given(st.tuples(SIDES, SIDES), contracts())
def test_there_are_tiles_exactly_where_the_guard_sees_too_little(size: Any, preprocessing: Preprocessing) -> None:
    across, down, whole = seen(size, preprocessing)
    if abs(across - 2) < 0.01 or abs(down - 2) < 0.01 or (preprocessing.fit == "crop" and min(size) < 20):
        return  # rounding
    assert (tiles_of(size, preprocessing) is not None) == (max(across, down) > 2 or not whole)


@SLOW
@given(st.tuples(SIDES, SIDES), contracts(), st.data())
def test_tiles_cover_resolve_and_cut_no_small_object(size: Any, preprocessing: Preprocessing, data: Any) -> None:
    tiles = tiles_of(size, preprocessing)
    if tiles is None:
        return
    assert 1 <= len(tiles.boxes) <= MOST_TILES and len(set(tiles.boxes)) == len(tiles.boxes)
    assert tiles.size[0] <= size[0] and tiles.size[1] <= size[1]
    guard = (preprocessing.width, preprocessing.height)
    for axis in (0, 1):
        assert tiles.frame[axis] <= MOST_SHRUNK * guard[axis]
        assert all(0 <= box[axis] < box[axis + 2] <= tiles.size[axis] for box in tiles.boxes)
    columns, rows = (sorted({(box[axis], box[axis + 2]) for box in tiles.boxes}) for axis in (0, 1))
    assert {(left, top, right, bottom) for (left, right), (top, bottom) in product(columns, rows)} == set(tiles.boxes)
    for axis, spans in enumerate((columns, rows)):
        length = min(max(1, tiles.frame[axis] // 3), tiles.size[axis])
        start = data.draw(st.integers(0, tiles.size[axis] - length))
        assert any(first <= start and start + length <= last for first, last in spans), "whole in one of them"


@SLOW
@given(st.tuples(SIDES, SIDES), contracts())
def test_what_is_shown_is_shrunk_no_further(size: Any, preprocessing: Preprocessing) -> None:
    tiles = tiles_of(size, preprocessing)
    if tiles is not None:
        again = tiles_of(tiles.size, preprocessing)
        assert again is None or again.size == tiles.size


@pytest.mark.parametrize("mode", MODES)
@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.tuples(st.integers(1, 300), st.integers(1, 300)), contracts(most=40), st.integers(0, 2**32 - 1))
def test_what_is_judged_is_what_is_shown(mode: ViewMode, size: Any, preprocessing: Preprocessing, seed: int) -> None:
    """Judging an image and judging what is shown of it are the same, and no more than was given is shown."""
    levels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    image = Image.fromarray(levels)
    visible = shown(image, preprocessing, mode)
    assert (np.asarray(shown(visible, preprocessing, mode)) == np.asarray(visible)).all()
    judged, again = (list(judged_pixels(each, preprocessing, mode)) for each in (image, visible))
    assert [name for name, _ in judged] == [name for name, _ in again] and judged[0][0] == ""
    for (_, one), (_, other) in zip(judged, again, strict=True):
        assert one.shape == (preprocessing.height, preprocessing.width, 3) and one.dtype == np.uint8
        assert (one == other).all()
    guard = (preprocessing.width, preprocessing.height)
    if mode == "judged":
        assert visible.size == guard or (visible.size[0] <= guard[0] and visible.size[1] <= guard[1])
        if visible.size == guard:
            assert (np.asarray(visible) == judged[0][1]).all(), "the very pixels"
    if mode == "whole":
        assert visible is image and len(judged) == 1
    if mode == "tiles":
        assert visible.size[0] <= size[0] and visible.size[1] <= size[1]


@settings(deadline=None, derandomize=True, max_examples=100)
@given(
    st.tuples(st.integers(40, 400), st.integers(40, 400)),
    st.sampled_from([("squash", None), ("pad", None), ("crop", 20), ("crop", 30), ("crop", 12)]),
    st.data(),
)
def test_no_corner_is_out_of_sight(size: Any, fit: Any, data: Any) -> None:
    """A red square of an eighth of the image's shorter side changes what is judged, wherever it is."""
    preprocessing = contract(20, 20, *fit)
    side = max(3, min(size) // 8)
    at = tuple(data.draw(st.sampled_from([0, (length - side) // 2, length - side])) for length in size)
    plain, marked = Image.new("RGB", size, "white"), Image.new("RGB", size, "white")
    marked.paste((255, 0, 0), (*at, at[0] + side, at[1] + side))
    most = 0
    for (_, one), (_, other) in zip(
        judged_pixels(plain, preprocessing, "tiles"), judged_pixels(marked, preprocessing, "tiles"), strict=True
    ):
        most = max(most, int(np.abs(one.astype(int) - other.astype(int)).max()))
    assert most > 50


@pytest.mark.parametrize("size", [(100, 2000), (2000, 100), (1, 65_000), (3, 4_000), (30, 31)])
def test_long_images(size: tuple[int, int]) -> None:
    """Nothing in a tile is distorted, however long the image is."""
    preprocessing = contract(112, 112)
    tiles = tiles_of(size, preprocessing)
    if size == (30, 31):
        assert tiles is None
        return
    assert tiles is not None and tiles.frame[0] == tiles.frame[1]
    image = Image.new("RGB", size, "white")
    assert len(list(judged_pixels(image, preprocessing, "tiles"))) == len(tiles.boxes) + 1


def test_small_images_cost_nothing() -> None:
    for preprocessing in (contract(112, 112), contract(84, 84, "pad"), contract(84, 84, "crop", 84)):
        image = Image.new("RGB", (168, 168), "red")
        assert shown(image, preprocessing, "tiles") is image
        assert [name for name, _ in judged_pixels(image, preprocessing, "tiles")] == [""]


def test_another_word_is_refused() -> None:
    with pytest.raises(InputError, match=r"view 'all' is unknown\. Allowed: tiles, judged, whole"):
        checked_mode("all")  # type: ignore[arg-type]


def test_every_command_that_judges_has_the_same_setting() -> None:
    for name in (
        "runtimes.check",
        "runtimes.gate.__main__",
        "runtimes.chat",
        "runtimes.gateway.__main__",
        "benchmarks.run",
        "calibration.thresholds",
    ):
        option = next(each for each in import_module(name).main.params if each.name == "view")
        assert option.default == "tiles" and tuple(option.type.choices) == MODES, name
