"""The vision tower and projector in llama.cpp's ``mmproj`` file, from the checkpoint's own, tuned tensors.

Names are those of llama.cpp's ``tools/mtmd``: ``clip.cpp``, ``clip-impl.h``, ``models/``.
Layers that the projector does not read are left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from export.gguf.layout import parameters, stored_as
from export.gguf.vision_keys import feature_layers, layers_read
from export.gguf.writing import GgufTensor, StoredType
from safevlm.checkpoint.checkpoint import Checkpoint
from safevlm.checkpoint.configs.transformers_config import build_vision_config
from safevlm.errors import CheckpointError

__all__ = ["MMPROJ_ARCHITECTURE", "vision_tensors"]

MMPROJ_ARCHITECTURE = "clip"
LAYER = re.compile(r"\.(?:layers|blocks)\.(\d+)\.")

VIT_LAYER = {
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
QWEN_LAYER = {
    "norm1": "ln1",
    "norm2": "ln2",
    "attn.proj": "attn_out",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOWER = "model.vision_tower."
PROJECTOR = "model.multi_modal_projector."
POSITIONS = "v.position_embd.weight"
FIRST_LINEAR = f"{PROJECTOR}linear_1.weight"


@dataclass(frozen=True, kw_only=True)
class _Vision:
    """What differs between families: names outside the layers, and names within."""

    layer_prefix: str
    layer: Mapping[str, str]
    others: Mapping[str, str]
    pooled: tuple[str, ...] = ()
    """Parameters that only the tower's pooled output reads; llama.cpp would apply them to the projector's input."""
    biases: Mapping[str, str] = field(default_factory=dict)
    """Places that llama.cpp adds without looking whether they are there, with the weight that each belongs to."""


def vision_tensors(checkpoint: Checkpoint, matrices: StoredType, *, class_token_last: bool = False) -> list[GgufTensor]:
    """Return the tensors to write; ``matrices`` is f16, bf16 or f32, for what is multiplied by.

    ``class_token_last`` turns LLaVA's table of positions for a llama.cpp that puts the class token behind the patches
    (see ``runtimes.language.llamacpp_first_patch``).

    Errors: CheckpointError for a tensor that is missing, or that llama.cpp has no place for.
    """
    config = build_vision_config(checkpoint)
    vision = _VISION[checkpoint.family.key]
    needed = layers_read(config)
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
    vision: _Vision
    config: Any
    matrices: StoredType

    def placed(self, name: str, shape: tuple[int, ...]) -> Iterator[GgufTensor]:
        """Yield what becomes of one tensor: itself under another name, or its parts."""
        if name in self.vision.others:
            yield from self._outside(name, shape, self.vision.others[name])
            return
        match = re.match(re.escape(self.vision.layer_prefix) + r"(\d+)\.(.+)\.(weight|bias)$", name)
        index, module, leaf = match.groups() if match else ("", "", "")
        if module == "attn.qkv":
            third = shape[0] // 3
            for number, letter in enumerate("qkv"):
                rows = partial(_rows, number * third, (number + 1) * third)
                yield self._part(name, f"v.blk.{index}.attn_{letter}.{leaf}", (third, *shape[1:]), rows)
            return
        if module not in self.vision.layer:
            raise CheckpointError(
                f"{self.checkpoint.name}: llama.cpp's projector file has no place for "
                f"'{stored_as(self.checkpoint, name)}', which the model reads. Use another runtime."
            )
        yield self._part(name, f"v.blk.{index}.{self._within(module)}.{leaf}", shape, _same)

    def _outside(self, name: str, shape: tuple[int, ...], place: str) -> Iterator[GgufTensor]:
        if name == FIRST_LINEAR:
            layers = feature_layers(self.config)
            width = shape[1] // len(layers)
            columns = partial(_by_layer, layers)
            yield self._part(name, place, (shape[0], width * len(set(layers))), columns)
        elif name.endswith("mm_soft_emb_norm.weight"):  # Gemma's norm: one more than its weight
            yield self._part(name, place, shape, lambda tensor: tensor.float() + 1)
        elif name == "model.visual.patch_embed.proj.weight":
            if shape[2] != 2:
                raise CheckpointError(f"'{name}' spans {shape[2]} frames; llama.cpp's Qwen2.5-VL takes 2.")
            for frame, end in ((0, ""), (1, ".1")):
                yield self._part(name, place + end, (*shape[:2], *shape[3:]), partial(_frame, frame))
        else:
            yield self._part(name, place, shape, _same)

    def _within(self, module: str) -> str:
        """Return a module's place in a layer.

        llama.cpp takes an MLP that is as wide as the tower for one of an old converter, which had names of its two
        linears the wrong way round, and swaps them: so such a one is written the wrong way round.
        """
        place, tower = self.vision.layer[module], self.config.vision_config
        if tower.intermediate_size != tower.hidden_size:
            return place
        return {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}.get(place, place)

    def _part(self, name: str, place: str, shape: tuple[int, ...], change: Callable[[Tensor], Tensor]) -> GgufTensor:
        embedded = place.startswith(("v.patch_embd", "v.position_embd", "v.class_embd"))
        kept: StoredType = "f32" if len(shape) < 2 or embedded else self.matrices
        return GgufTensor(
            name=place,
            source=stored_as(self.checkpoint, name),
            shape=shape,
            type=kept,
            read=lambda: change(self.checkpoint.tensors.read(name, own=True)),
        )


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _by_layer(layers: tuple[int, ...], tensor: Tensor) -> Tensor:
    """Put columns, a block a layer that is read, in llama.cpp's order: from the first layer, each once."""
    if len(layers) == 1:
        return tensor
    blocks = tensor.float().chunk(len(layers), dim=1)
    each = (sum(block for block, at in zip(blocks, layers, strict=True) if at == layer) for layer in sorted({*layers}))
    return torch.cat(tuple(cast(Iterator[Tensor], each)), dim=1)


def _rows(start: int, stop: int, tensor: Tensor) -> Tensor:
    return tensor[start:stop]


def _frame(number: int, tensor: Tensor) -> Tensor:
    return tensor[:, :, number]


# -- families -------------------------------------------------------------------------------------------


def _with_leaves(names: Mapping[str, str]) -> dict[str, str]:
    return {f"{name}.{leaf}": f"{place}.{leaf}" for name, place in names.items() for leaf in ("weight", "bias")}


_VISION: Mapping[str, _Vision] = {
    "llava": _Vision(
        layer_prefix=f"{TOWER}encoder.layers.",
        layer=VIT_LAYER,
        others={
            f"{TOWER}embeddings.class_embedding": "v.class_embd",
            f"{TOWER}embeddings.patch_embedding.weight": "v.patch_embd.weight",
            f"{TOWER}embeddings.position_embedding.weight": "v.position_embd.weight",
            **_with_leaves(
                {
                    f"{TOWER}pre_layrnorm": "v.pre_ln",
                    f"{PROJECTOR}linear_1": "mm.0",
                    f"{PROJECTOR}linear_2": "mm.2",
                }
            ),
        },
        pooled=(f"{TOWER}post_layernorm.",),
        biases={"mm.0.bias": "mm.0.weight", "mm.2.bias": "mm.2.weight"},
    ),
    "qwen2_5_vl": _Vision(
        layer_prefix="model.visual.blocks.",
        layer=QWEN_LAYER,
        others={
            "model.visual.patch_embed.proj.weight": "v.patch_embd.weight",
            "model.visual.merger.ln_q.weight": "v.post_ln.weight",
            **_with_leaves({"model.visual.merger.mlp.0": "mm.0", "model.visual.merger.mlp.2": "mm.2"}),
        },
    ),
    "gemma3": _Vision(
        layer_prefix=f"{TOWER}encoder.layers.",
        layer=VIT_LAYER,
        others={
            f"{TOWER}embeddings.position_embedding.weight": "v.position_embd.weight",
            **_with_leaves(
                {f"{TOWER}embeddings.patch_embedding": "v.patch_embd", f"{TOWER}post_layernorm": "v.post_ln"}
            ),
            f"{PROJECTOR}mm_input_projection_weight": "mm.input_projection.weight",
            f"{PROJECTOR}mm_soft_emb_norm.weight": "mm.soft_emb_norm.weight",
        },
    ),
}
