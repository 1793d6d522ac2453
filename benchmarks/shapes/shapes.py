"""The shapes of the six real guards' vision paths, from ``shapes.json``, for speed figures without their weights.

Sources: the model cards of ``etri-vilab`` and of their bases; ``hidden_size`` is the language model's width, which
the projector ends in and the guard head begins with. Keys of ``config`` are those of transformers' vision configs.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from safevlm.errors import InputError

__all__ = ["VisionShape", "find_shape", "shape_names"]


@dataclass(frozen=True, kw_only=True)
class VisionShape:
    """A vision tower and the width that its projector ends in.

    The tap reads the output of ``layers_read`` tower layers; ``layers_behind_tap`` more are stored (LLaVA reads
    layer -2 of CLIP, whose last layer torch eager runs and the exported graph leaves out).
    """

    name: str
    family: str
    tower: str
    hidden_size: int
    layers_read: int
    layers_behind_tap: int
    config: Mapping[str, Any]
    language: Mapping[str, Any] = field(default_factory=dict)
    """The language model's, under transformers' names: layers, heads, key-value heads, MLP width, vocabulary."""

    @property
    def layers(self) -> int:
        """Layers of the tower, those behind the tap included."""
        return self.layers_read + self.layers_behind_tap

    @property
    def head_widths(self) -> tuple[int, int, int]:
        """Widths of the guard head: H, H/2 and the 20 published classes."""
        return self.hidden_size, self.hidden_size // 2, 20

    def shortened(self, layers: int | None) -> VisionShape:
        """Return the shape with only the first ``layers`` of the layers that the tap reads.

        Raises InputError for fewer than one or more than there are.
        """
        if layers is None:
            return self
        if not 1 <= layers <= self.layers_read:
            raise InputError(
                f"--layers {layers}: the guard of {self.name} reads {self.layers_read} layers of {self.tower}. Give 1 "
                f"to {self.layers_read}."
            )
        return VisionShape(**{**vars(self), "layers_read": layers})


@cache
def _shapes() -> dict[str, VisionShape]:
    stored = json.loads(Path(__file__).with_name("shapes.json").read_text(encoding="utf-8"))
    shapes = {}
    for name, entry in stored["shapes"].items():
        tower = stored["towers"][entry["tower"]]
        shapes[name] = VisionShape(
            name=name,
            family=entry["family"],
            tower=entry["tower"],
            hidden_size=entry["hidden_size"],
            layers_read=tower["layers"] - tower["layers_behind_tap"],
            layers_behind_tap=tower["layers_behind_tap"],
            config=tower["config"],
            language=stored["languages"][name],
        )
    return shapes


def shape_names() -> tuple[str, ...]:
    """Return the names that :func:`find_shape` knows."""
    return tuple(_shapes())


def find_shape(name: str) -> VisionShape:
    """Return a real model's vision shape; InputError, with the nearest name, for one that is not known."""
    shapes = _shapes()
    if name in shapes:
        return shapes[name]
    folded = {known.lower(): known for known in shapes}
    near = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.5)
    nearest = f" The nearest is {folded[near[0]]}." if near else ""
    raise InputError(f"--shape {name} is unknown. Allowed: {', '.join(shapes)}.{nearest}")
