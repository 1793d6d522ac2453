"""A part's images in memory, already at a family's input size, with what they show as arrays."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from benchmarks.tiny.blueprints import Blueprint
from calibration.holisafe_mini.scene import Scene, draw, sample_scene, scene_rng, world

__all__ = ["Pictures"]


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Drawn images: ``pixels`` uint8 N×S×S×3, scene by scene."""

    pixels: NDArray[np.uint8]
    scenes: list[Scene]

    @classmethod
    def drawn(cls, part: str, count: int, blueprint: Blueprint) -> Pictures:
        """Draw ``count`` images of a part; half are safe, the other half spread evenly over the classes."""
        size, resample = _input_size(blueprint)
        with ProcessPoolExecutor(max_workers=2) as pool:
            pixels = list(pool.map(partial(_pixels, part, size, resample), range(count), chunksize=500))
        return cls(pixels=np.stack(pixels), scenes=[_scene(part, index) for index in range(count)])

    def __len__(self) -> int:
        return len(self.scenes)

    def sample(self, rng: np.random.Generator, count: int, safe: float) -> NDArray[np.int64]:
        """Return the numbers of ``count`` images, the share ``safe`` of them safe: those with even numbers."""
        half = rng.integers(len(self) // 2, size=count)
        return 2 * half + (rng.random(count) >= safe)

    def rgb(self, batch: NDArray[np.int64]) -> Tensor:
        """Return uint8 B×S×S×3."""
        return torch.from_numpy(self.pixels[batch])

    def labels(self, batch: NDArray[np.int64]) -> Tensor:
        """Return the class of each image, int64 B."""
        return torch.tensor([self.scenes[i].label for i in batch])

    def cells(self, batch: NDArray[np.int64]) -> Tensor:
        """Return what lies in each cell, int64 B×4×2: kind and colour, 0 for nothing."""
        return torch.tensor([_cells(self.scenes[i]) for i in batch])


def _scene(part: str, index: int) -> Scene:
    rng = scene_rng(part, index)
    label = 0 if index % 2 == 0 else index // 2 % 19 + 1
    return sample_scene(rng, label)


def _input_size(blueprint: Blueprint) -> tuple[int, int]:
    processor = blueprint.processor
    if "max_pixels" in processor:
        return int(processor["max_pixels"] ** 0.5), int(processor["resample"])
    return int(blueprint.vision["image_size"]), int(processor["resample"])


def _pixels(part: str, size: int, resample: int, index: int) -> NDArray[np.uint8]:
    picture = draw(_scene(part, index))
    return np.asarray(picture.resize((size, size), Image.Resampling(resample)))


def _cells(scene: Scene) -> list[list[int]]:
    shapes, colours, cells = world()["shapes"], list(world()["colours"]), list(world()["cells"])
    found = [[0, 0] for _ in cells]
    for shape in scene.shapes:
        found[cells.index(shape.cell)] = [1 + shapes.index(shape.kind), 1 + colours.index(shape.colour)]
    if scene.symbol_cell is not None:
        found[cells.index(scene.symbol_cell)] = [len(shapes) + scene.label, 0]
    return found
