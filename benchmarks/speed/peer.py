"""Who is measured: a guard, and one way to run it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from safevlm.checkpoint.family import TapSource
from safevlm.contract.preprocessing import Preprocessing

__all__ = ["NAMES", "NNCF_FILE", "PLAIN", "WORK", "Device", "Peer", "Runtime", "Subject", "Work", "random_images"]


Runtime = Literal["torch", "compile", "onnxruntime", "openvino", "tensorrt"]


Device = Literal["cpu", "gpu"]


Work = Literal["guard", "shared", "vision"]


NAMES: Mapping[Runtime, str] = {
    "torch": "torch eager",
    "compile": "torch.compile",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "tensorrt": "TensorRT",
}


PLAIN = "plain"
"""Folder, in the scratch bundle, of what peers run: the same guard in standard operators, and what they make of it."""


NNCF_FILE = "guard.int8.xml"
"""What NNCF makes in there, in OpenVINO's own format; no manifest lists it."""


WORK: Mapping[Work, str] = {"guard": "", "shared": ", guard with embeddings", "vision": ", vision tower alone"}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The guard that is measured: a checkpoint, or random weights at a real one's shape.

    ``layers`` and ``seed`` are of random weights, ``tap`` and ``revision`` of a checkpoint.
    """

    name: str
    random: bool
    layers: int | None = None
    seed: int = 0
    tap: TapSource | None = None
    revision: str | None = None


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One way to run the guard. ``path`` is its file in the folder ``bundle``, ``given`` when the caller named that.

    ``work`` is what it computes: a guard's probabilities, these and the image embeddings, or embeddings alone.
    ``ours`` is what this project makes for that runtime; the others are what people use today. ``python`` is the
    interpreter of another environment.
    """

    runtime: Runtime
    precision: str
    device: Device = "cpu"
    bundle: str | None = None
    given: bool = False
    path: str | None = None
    work: Work = "guard"
    ours: bool = False
    python: str | None = None

    @property
    def title(self) -> str:
        """The runtime's name, with the bundle's where the caller gave one, and its work where it is not the guard's."""
        name = NAMES[self.runtime] + WORK[self.work]
        if self.path == NNCF_FILE:
            name += ", NNCF"
        elif self.bundle is not None and not self.ours and not self.given:
            name += ", plain graph"
        return f"{name} ({self.bundle})" if self.given else name


def random_images(preprocessing: Preprocessing, count: int, seed: int) -> NDArray[np.uint8]:
    """Return ``count`` images of noise, uint8 N × H × W × 3 at the contract's size."""
    shape = (count, preprocessing.height, preprocessing.width, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
