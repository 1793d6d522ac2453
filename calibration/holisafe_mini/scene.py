"""Pictures of the drawn world: a scene is sampled from a seed, then drawn."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

__all__ = ["PARTS", "Scene", "Shape", "draw", "sample_scene", "scene_rng", "world"]

PARTS = ("train", "calibration", "test")
"""Each part draws from random streams of its own, so no image is in two parts."""

_SUPERSAMPLING = 4


@cache
def world() -> Mapping[str, Any]:
    """Return the world's data: shapes, colours, symbols, hazards and sentence templates."""
    text = resources.files("calibration.holisafe_mini").joinpath("world.json").read_text(encoding="utf-8")
    data: Mapping[str, Any] = json.loads(text)
    return data


@dataclass(frozen=True)
class Shape:
    """A filled shape: its kind and colour by name, the cell that it lies in."""

    kind: str
    colour: str
    cell: str


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What an image shows.

    ``label`` is 0 for safe, else the class whose symbol lies in ``symbol_cell``. ``jitter`` seeds everything
    that has no name: sizes, offsets, rotation, the ground's tint.
    """

    shapes: tuple[Shape, ...]
    label: int
    symbol_cell: str | None
    jitter: int

    def shape(self, kind: str) -> Shape | None:
        """Return the shape of this kind, or ``None``; a scene has at most one of a kind."""
        return next((shape for shape in self.shapes if shape.kind == kind), None)


def scene_rng(part: str, index: int, *, seed: int = 0) -> np.random.Generator:
    """Return the random stream of one image of one part."""
    return np.random.default_rng([seed, PARTS.index(part), index])


def sample_scene(rng: np.random.Generator, label: int) -> Scene:
    """Sample one to three shapes of different kinds and colours, and the symbol of ``label`` (0: none)."""
    cells = [str(cell) for cell in rng.permutation(list(world()["cells"]))]
    count = int(rng.integers(1, 4))
    kinds = rng.permutation(world()["shapes"])[:count]
    colours = rng.permutation(list(world()["colours"]))[:count]
    shapes = tuple(
        Shape(str(kind), str(colour), cell) for kind, colour, cell in zip(kinds, colours, cells[:count], strict=True)
    )
    return Scene(
        shapes=shapes,
        label=label,
        symbol_cell=cells[3] if label else None,
        jitter=int(rng.integers(2**31)),
    )


def draw(scene: Scene) -> Image.Image:
    """Draw a scene as an RGB image of ``picture_size`` × ``picture_size`` pixels, the same for the same scene."""
    rng = np.random.default_rng(scene.jitter)
    size = int(world()["picture_size"]) * _SUPERSAMPLING
    ground = tuple(int(v) for v in rng.integers(216, 256, 3))
    picture = Image.new("RGB", (size, size), ground)
    pen = ImageDraw.Draw(picture)
    for shape in scene.shapes:
        colour = tuple(world()["colours"][shape.colour])
        pen.polygon(_outline(shape.kind, *_place(shape.cell, size, rng), rng), fill=colour)
    if scene.symbol_cell is not None:
        _draw_symbol(pen, scene, size, rng)
    return picture.resize((size // _SUPERSAMPLING,) * 2, Image.Resampling.BOX)


def _place(cell: str, size: int, rng: np.random.Generator) -> tuple[float, float, float]:
    """Return centre x, centre y and radius for something in a cell, jittered inside it."""
    row, column = world()["cells"][cell]
    half = size / 4
    radius = half * rng.uniform(0.58, 0.78)
    slack = (half - radius) * 0.8
    x = half * (2 * column + 1) + rng.uniform(-slack, slack)
    y = half * (2 * row + 1) + rng.uniform(-slack, slack)
    return float(x), float(y), float(radius)


def _outline(kind: str, x: float, y: float, radius: float, rng: np.random.Generator) -> list[tuple[float, float]]:
    """Return the corners of a shape, slightly rotated: radii and angles (in turns) by kind."""
    corners = {
        "circle": [(1.0, i / 64) for i in range(64)],
        "square": [(1.0, i / 4 + 1 / 8) for i in range(4)],
        "triangle": [(1.0, i / 3 - 1 / 4) for i in range(3)],
        "star": [(1.0 - 0.58 * (i % 2), i / 10 - 1 / 4) for i in range(10)],
        "dome": [(1.0, 1 / 2 + i / 64) for i in range(33)],
    }[kind]
    turn = rng.uniform(-0.025, 0.025)
    lift = 0.4 * radius if kind == "dome" else 0.0
    return [
        (
            x + radius * reach * math.cos(2 * math.pi * (angle + turn)),
            y + lift + radius * reach * math.sin(2 * math.pi * (angle + turn)),
        )
        for reach, angle in corners
    ]


def _draw_symbol(pen: ImageDraw.ImageDraw, scene: Scene, size: int, rng: np.random.Generator) -> None:
    """Draw the symbol of a scene's class as thick strokes with round ends."""
    assert scene.symbol_cell is not None
    x, y, radius = _place(scene.symbol_cell, size, rng)
    scale = radius * 0.82 / 2
    strokes = list(world()["classes"].values())[scene.label - 1]["symbol"]
    ink = tuple(world()["ink"])
    width = radius * float(rng.uniform(0.19, 0.25))
    for stroke in strokes:
        points = [(x + (px - 2) * scale, y + (py - 2) * scale) for px, py in stroke]
        pen.line(points, fill=ink, width=round(width), joint="curve")
        for px, py in points:
            pen.ellipse((px - width / 2, py - width / 2, px + width / 2, py + width / 2), fill=ink)
