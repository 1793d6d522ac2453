"""The vision tower and projector as llama.cpp's ``mmproj`` file, from the checkpoint's own, tuned tensors.

Names and keys are those of llama.cpp's ``tools/mtmd``: ``clip.cpp``, ``clip-impl.h``, ``models/``.
Layers that the projector does not read are left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from export.gguf.layout import parameters, stored_as
from export.gguf.writing import GgufTensor, StoredType
from models.checkpoint import Checkpoint
from models.errors import CheckpointError, InputError
from models.preprocessing import Preprocessing
from models.transformers_config import build_vision_config
from runtimes.llamacpp_first_patch import FEATURE_LAYERS_KEY

__all__ = ["MMPROJ_ARCHITECTURE", "vision_keys", "vision_tensors"]

MMPROJ_ARCHITECTURE = "clip"
QWEN_WINDOW = 112
"""Pixels; fixed in llama.cpp."""
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
GELU = ("gelu", "gelu_pytorch_tanh", "gelu_new")
QWEN_TOKENS = (8, 4096)
LARGEST_SIDE = 8192


@dataclass(frozen=True, kw_only=True)
class _Vision:
    """What differs between families: names outside the layers, names within, and keys."""

    projector_type: str
    layer_prefix: str
    layer: Mapping[str, str]
    others: Mapping[str, str]
    layers_read: Callable[[Any], int]
    set_keys: Callable[[Any, Any], None]
    pooled: tuple[str, ...] = ()
    """Parameters that only the tower's pooled output reads; llama.cpp would apply them to the projector's input."""
    biases: Mapping[str, str] = field(default_factory=dict)
    """Places that llama.cpp adds without looking whether they are there, with the weight that each belongs to."""


def vision_tensors(checkpoint: Checkpoint, matrices: StoredType, *, class_token_last: bool = False) -> list[GgufTensor]:
    """Return the tensors to write; ``matrices`` is f16, bf16 or f32, for what is multiplied by.

    ``class_token_last`` turns LLaVA's table of positions for a llama.cpp that puts the class token behind the patches
    (see ``runtimes.llamacpp_first_patch``).

    Errors: CheckpointError for a tensor that is missing, or that llama.cpp has no place for.
    """
    config = build_vision_config(checkpoint)
    vision = _VISION[checkpoint.family.key]
    read_layers = vision.layers_read(config)
    placing = _Placing(checkpoint, vision, config, matrices)
    found = []
    for name, shape in parameters(checkpoint, checkpoint.family.vision_prefixes).items():
        layer = LAYER.search(name)
        if name.startswith(vision.pooled) or (layer is not None and int(layer.group(1)) >= read_layers):
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
            layers = _feature_layers(self.config)
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


def vision_keys(checkpoint: Checkpoint, preprocessing: Preprocessing, writer: Any) -> None:
    """Set the metadata of the projector file.

    Errors: CheckpointError for a tower that llama.cpp's graph does not compute.
    """
    config = build_vision_config(checkpoint)
    tower: Any = config.vision_config
    vision = _VISION[checkpoint.family.key]
    writer.add_type("mmproj")
    writer.add_name(checkpoint.name)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(vision.projector_type)
    writer.add_vision_projection_dim(checkpoint.hidden_size)
    writer.add_vision_patch_size(tower.patch_size)
    writer.add_vision_embedding_length(tower.hidden_size)
    writer.add_vision_feed_forward_length(tower.intermediate_size)
    writer.add_vision_block_count(vision.layers_read(config))
    grey = 255 * preprocessing.rescale  # llama.cpp divides grey levels by 255
    writer.add_vision_image_mean([value / grey for value in preprocessing.mean])
    writer.add_vision_image_std([value / grey for value in preprocessing.std])
    vision.set_keys(writer, config)
    _check_tower(checkpoint, tower, preprocessing)


# -- families -------------------------------------------------------------------------------------------


def _wanted(tower: Any, key: str, *allowed: Any) -> None:
    value = getattr(tower, key, None)
    if value not in allowed:
        raise CheckpointError(
            f"config.json states {key} = {value!r} of the vision tower or projector; llama.cpp's graph computes "
            f"{' or '.join(map(repr, allowed))}. Use another runtime."
        )


def _check_tower(checkpoint: Checkpoint, tower: Any, preprocessing: Preprocessing) -> None:
    """Refuse what llama.cpp would fail on when it loads or first computes, where it ends the whole process."""
    qwen = checkpoint.family.key == "qwen2_5_vl"
    heads, channels = (tower.num_heads, tower.in_channels) if qwen else (tower.num_attention_heads, tower.num_channels)
    unit = 4 * heads if qwen else heads  # Qwen's rotary embedding has two axes
    if tower.hidden_size % unit:
        raise CheckpointError(
            f"config.json states a vision tower of width {tower.hidden_size} with {heads} heads; a multiple of {unit} "
            "is needed. Correct vision_config."
        )
    if channels != 3:
        raise CheckpointError(f"config.json states images of {channels} channels; llama.cpp's have 3.")
    if max(preprocessing.height, preprocessing.width) > LARGEST_SIDE and not qwen:
        raise CheckpointError(
            f"config.json states images of {preprocessing.height}x{preprocessing.width} pixels; llama.cpp's vision "
            f"towers take up to {LARGEST_SIDE} a side."
        )
    if qwen:
        side = tower.patch_size * tower.spatial_merge_size
        tokens = preprocessing.height * preprocessing.width // side**2
        fewest, most = QWEN_TOKENS
        if not fewest <= tokens <= most:
            raise InputError(
                f"images of {preprocessing.height}x{preprocessing.width} pixels are {tokens} image tokens; llama.cpp "
                f"takes {fewest} to {most:,} of Qwen2.5-VL. Give another --grid in multiples of {side} pixels."
            )


def _set_activation(writer: Any, tower: Any) -> None:
    """Set the tower's activation; llama.cpp computes GELU by its tanh formula, which is off by 5e-4 at most."""
    _wanted(tower, "hidden_act", "quick_gelu", *GELU)
    if tower.hidden_act in GELU:
        writer.add_vision_use_gelu(True)


def _feature_layers(config: Any) -> tuple[int, ...]:
    """Return the hidden states that LLaVA's projector reads side by side, counted from the first layer."""
    stated = config.vision_feature_layer
    last = config.vision_config.num_hidden_layers
    layers = [stated] if isinstance(stated, int) else list(stated)
    return tuple(layer if layer >= 0 else last + 1 + layer for layer in layers)


def _llava_keys(writer: Any, config: Any) -> None:
    tower = config.vision_config
    _wanted(config, "vision_feature_select_strategy", "default")
    _wanted(config, "projector_hidden_act", *GELU)
    _set_activation(writer, tower)
    writer.add_vision_image_size(tower.image_size)
    writer.add_vision_head_count(tower.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(tower.layer_norm_eps)
    # the output of so many layers; without it llama.cpp would leave out the last of those that are there
    writer.add_array(FEATURE_LAYERS_KEY, sorted({*_feature_layers(config)}))


def _qwen_keys(writer: Any, config: Any) -> None:
    tower = config.vision_config
    _wanted(tower, "hidden_act", "silu")
    _wanted(tower, "window_size", QWEN_WINDOW)
    _wanted(tower, "spatial_merge_size", 2)
    if not 0 < tower.patch_size <= QWEN_WINDOW // 2:
        raise CheckpointError(
            f"config.json states patches of {tower.patch_size} pixels; windows of {QWEN_WINDOW} pixels hold two a side."
        )
    writer.add_vision_image_size(560)  # of no effect: sizes are free
    writer.add_vision_head_count(tower.num_heads)
    writer.add_vision_attention_layernorm_eps(1e-6)
    writer.add_vision_use_silu(True)
    writer.add_vision_n_wa_pattern(_full_attention_every(tower))
    writer.add_vision_spatial_merge_size(tower.spatial_merge_size)


def _full_attention_every(tower: Any) -> int:
    """Return n where every n-th layer has full attention and the others windows; 0 where all have full attention."""
    full, depth = sorted({index for index in tower.fullatt_block_indexes if 0 <= index < tower.depth}), tower.depth
    if full == list(range(depth)):
        return 0
    every: int = full[0] + 1 if full else depth + 1
    if full != list(range(every - 1, depth, every)):
        raise CheckpointError(
            f"config.json states full attention in layers {full} of {depth}; llama.cpp has it in every n-th layer, all "
            "or none. Use another runtime."
        )
    return every


def _gemma_keys(writer: Any, config: Any) -> None:
    tower = config.vision_config
    _set_activation(writer, tower)
    writer.add_vision_image_size(tower.image_size)
    writer.add_vision_head_count(tower.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(tower.layer_norm_eps)
    writer.add_vision_projector_scale_factor(
        tower.image_size // tower.patch_size // math.isqrt(config.mm_tokens_per_image)
    )


def _with_leaves(names: Mapping[str, str]) -> dict[str, str]:
    return {f"{name}.{leaf}": f"{place}.{leaf}" for name, place in names.items() for leaf in ("weight", "bias")}


_VISION: Mapping[str, _Vision] = {
    "llava": _Vision(
        projector_type="mlp",
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
        layers_read=lambda config: max(_feature_layers(config)),
        set_keys=_llava_keys,
        pooled=(f"{TOWER}post_layernorm.",),
        biases={"mm.0.bias": "mm.0.weight", "mm.2.bias": "mm.2.weight"},
    ),
    "qwen2_5_vl": _Vision(
        projector_type="qwen2.5vl_merger",
        layer_prefix="model.visual.blocks.",
        layer=QWEN_LAYER,
        others={
            "model.visual.patch_embed.proj.weight": "v.patch_embd.weight",
            "model.visual.merger.ln_q.weight": "v.post_ln.weight",
            **_with_leaves({"model.visual.merger.mlp.0": "mm.0", "model.visual.merger.mlp.2": "mm.2"}),
        },
        layers_read=lambda config: int(config.vision_config.depth),
        set_keys=_qwen_keys,
    ),
    "gemma3": _Vision(
        projector_type="gemma3",
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
        layers_read=lambda config: int(config.vision_config.num_hidden_layers),
        set_keys=_gemma_keys,
    ),
}
