"""The vision tower and projector in llama.cpp's ``mmproj`` file, from the checkpoint's own, tuned tensors.

Names are those of llama.cpp's ``tools/mtmd``: ``clip.cpp``, ``clip-impl.h``, ``models/``.
Layers that the projector does not read are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from export.gguf.families import gguf_family_of
from export.gguf.families.family import GgufVision, Part
from export.gguf.layout import parameters, stored_as
from export.gguf.writing import GgufTensor, StoredType
from safevlm.checkpoint.checkpoint import Checkpoint
from safevlm.checkpoint.configs.transformers_config import build_vision_config
from safevlm.errors import CheckpointError

__all__ = ["MMPROJ_ARCHITECTURE", "vision_tensors"]

MMPROJ_ARCHITECTURE = "clip"
LAYER = re.compile(r"\.(?:layers|blocks)\.(\d+)\.")

POSITIONS = "v.position_embd.weight"


def vision_tensors(checkpoint: Checkpoint, matrices: StoredType, *, class_token_last: bool = False) -> list[GgufTensor]:
    """Return the tensors to write; ``matrices`` is f16, bf16 or f32, for what is multiplied by.

    ``class_token_last`` turns LLaVA's table of positions for a llama.cpp that puts the class token behind the patches
    (see ``runtimes.language.llamacpp_first_patch``).

    Raises CheckpointError for a tensor that is missing, or that llama.cpp has no place for.
    """
    config = build_vision_config(checkpoint)
    vision = gguf_family_of(checkpoint).vision
    needed = vision.layers_read(config)
    placing = _Placing(checkpoint, vision, config, matrices)
    found = []
    for name, shape in parameters(checkpoint, checkpoint.family.vision_prefixes).items():
        layer = LAYER.search(name)
        if name.startswith(vision.pooled) or (layer is not None and int(layer.group(1)) >= needed):
            continue
        found += list(placing.placed(name, shape))
    if class_token_last:
        found = [_class_token_last(tensor) if tensor.name == POSITIONS else tensor for tensor in found]
    places = {tensor.name: tensor for tensor in found}
    return found + [_zeros(bias, places[weight]) for bias, weight in vision.biases.items() if bias not in places]


def _zeros(place: str, weight: GgufTensor) -> GgufTensor:
    """Return the bias of a linear that has none."""
    rows = weight.shape[0]
    return replace(weight, name=place, shape=(rows,), type="f32", read=lambda: torch.zeros(rows))


def _class_token_last(positions: GgufTensor) -> GgufTensor:
    return replace(positions, read=lambda: positions.read().roll(-1, dims=0))


@dataclass(frozen=True)
class _Placing:
    """Where the tensors of one checkpoint go."""

    checkpoint: Checkpoint
    vision: GgufVision
    config: Any
    matrices: StoredType

    def placed(self, name: str, shape: tuple[int, ...]) -> Iterator[GgufTensor]:
        """Yield what becomes of one tensor: itself under another name, or its parts."""
        for part in self._parts(name, shape):
            yield self._written(name, part)

    def _parts(self, name: str, shape: tuple[int, ...]) -> Iterator[Part]:
        vision = self.vision
        if name in vision.changed:
            yield from vision.changed[name](self.config, vision.others[name], shape)
            return
        if name in vision.others:
            yield Part(vision.others[name], shape)
            return
        match = re.match(re.escape(vision.layer_prefix) + r"(\d+)\.(.+)\.(weight|bias)$", name)
        index, module, leaf = match.groups() if match else ("", "", "")
        if module in vision.split:
            places = vision.split[module]
            rows = shape[0] // len(places)
            for number, place in enumerate(places):
                change = partial(_rows, number * rows, (number + 1) * rows)
                yield Part(f"v.blk.{index}.{place}.{leaf}", (rows, *shape[1:]), change)
            return
        if module not in vision.layer:
            raise CheckpointError(
                f"{self.checkpoint.name}: llama.cpp's projector file does not support "
                f"'{stored_as(self.checkpoint, name)}', which the model needs. Use another runtime."
            )
        yield Part(f"v.blk.{index}.{self._within(module)}.{leaf}", shape)

    def _within(self, module: str) -> str:
        """Return a module's place in a layer.

        llama.cpp takes an MLP that is as wide as the tower for one of an old converter, which had names of its two
        linears the wrong way round, and swaps them: so such a one is written the wrong way round.
        """
        place, tower = self.vision.layer[module], self.config.vision_config
        if tower.intermediate_size != tower.hidden_size:
            return place
        return {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}.get(place, place)

    def _written(self, name: str, part: Part) -> GgufTensor:
        embedded = part.place.startswith(("v.patch_embd", "v.position_embd", "v.class_embd"))
        kept: StoredType = "f32" if len(part.shape) < 2 or embedded else self.matrices
        return GgufTensor(
            name=part.place,
            source=stored_as(self.checkpoint, name),
            shape=part.shape,
            type=kept,
            read=lambda: part.change(self.checkpoint.tensors.read(name, own=True)),
        )


def _rows(start: int, stop: int, tensor: Tensor) -> Tensor:
    return tensor[start:stop]
