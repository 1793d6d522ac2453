"""The vision tower and projector as llama.cpp's ``mmproj`` file, from the checkpoint's own, tuned tensors.

Names and keys are those of llama.cpp's ``tools/mtmd``: ``clip.cpp``, ``clip-impl.h``, ``models/``.
Layers that the projector does not read are left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from export.gguf.writing import GgufTensor, StoredType
from models.checkpoint import Checkpoint
from models.errors import CheckpointError
from models.preprocessing import Preprocessing
from models.transformers_config import build_vision_config

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


@dataclass(frozen=True, kw_only=True)
class _Vision:
    """What differs between families: names outside the layers, names within, and keys."""

    projector_type: str
    layer_prefix: str
    layer: Mapping[str, str]
    others: Mapping[str, str]
    layers_read: Callable[[Any], int]
    set_keys: Callable[[Any, Any], None]
    optional: tuple[str, ...] = ()
    """Names that may be left out because nothing that is run reads them."""


def vision_tensors(checkpoint: Checkpoint, matrices: StoredType, *, class_token_last: bool = False) -> list[GgufTensor]:
    """Return the tensors to write; ``matrices`` is f16, bf16 or f32, for what is multiplied by.

    ``class_token_last`` turns LLaVA's table of positions for a llama.cpp that puts the class token behind the patches
    (see ``runtimes.llamacpp_first_patch``).

    Errors: CheckpointError for a tensor that llama.cpp has no place for, or one that it needs and is not there.
    """
    vision = _VISION[checkpoint.family.key]
    read_layers = vision.layers_read(build_vision_config(checkpoint))
    found = []
    for name in checkpoint.vision_names():
        if name in vision.optional:
            continue
        layer = LAYER.search(name)
        if layer is not None and int(layer.group(1)) >= read_layers:
            continue
        found += list(_placed(checkpoint, vision, name, matrices))
    if class_token_last:
        found = [_class_token_last(tensor) if tensor.name == POSITIONS else tensor for tensor in found]
    missing = {f"{place}" for place in vision.others.values()} - {tensor.name for tensor in found}
    if missing:
        raise CheckpointError(f"{checkpoint.name}: the projector file would lack {', '.join(sorted(missing))}.")
    return found


def _class_token_last(positions: GgufTensor) -> GgufTensor:
    return replace(positions, read=lambda: positions.read().roll(-1, dims=0))


def _placed(checkpoint: Checkpoint, vision: _Vision, name: str, matrices: StoredType) -> Iterator[GgufTensor]:
    """Yield what becomes of one tensor: itself under another name, or its parts."""
    shape = checkpoint.tensors.shape(name)

    def part(place: str, shape: tuple[int, ...], change: Callable[[Tensor], Tensor]) -> GgufTensor:
        embedded = place.startswith(("v.patch_embd", "v.position_embd", "v.class_embd"))
        kept: StoredType = "f32" if len(shape) < 2 or embedded else matrices
        return GgufTensor(
            name=place, shape=shape, type=kept, read=lambda: change(checkpoint.tensors.read(name, own=True))
        )

    if name in vision.others:
        place = vision.others[name]
        if name.endswith("mm_soft_emb_norm.weight"):  # Gemma's norm: one more than its weight
            yield part(place, shape, lambda tensor: tensor.float() + 1)
        elif name == "model.visual.patch_embed.proj.weight":
            if shape[2] != 2:
                raise CheckpointError(f"'{name}' spans {shape[2]} frames; llama.cpp's Qwen2.5-VL takes 2.")
            for frame, end in ((0, ""), (1, ".1")):
                yield part(place + end, (*shape[:2], *shape[3:]), partial(_frame, frame))
        else:
            yield part(place, shape, lambda tensor: tensor)
        return
    match = re.match(re.escape(vision.layer_prefix) + r"(\d+)\.(.+)\.(weight|bias)$", name)
    if match is None:
        raise CheckpointError(f"{checkpoint.name}: llama.cpp's projector file has no place for '{name}'.")
    index, module, leaf = match.groups()
    if module == "attn.qkv":
        third = shape[0] // 3
        for number, letter in enumerate("qkv"):
            rows = partial(_rows, number * third, (number + 1) * third)
            yield part(f"v.blk.{index}.attn_{letter}.{leaf}", (third, *shape[1:]), rows)
        return
    if module not in vision.layer:
        raise CheckpointError(f"{checkpoint.name}: llama.cpp's projector file has no place for '{name}'.")
    yield part(f"v.blk.{index}.{vision.layer[module]}.{leaf}", shape, lambda tensor: tensor)


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
    writer.add_vision_image_mean(list(preprocessing.mean))
    writer.add_vision_image_std(list(preprocessing.std))
    vision.set_keys(writer, config)


# -- families -------------------------------------------------------------------------------------------


def _wanted(tower: Any, key: str, *allowed: Any) -> None:
    value = getattr(tower, key, None)
    if value not in allowed:
        raise CheckpointError(
            f"config.json states vision_config.{key} = {value!r}; llama.cpp's graph of this tower computes "
            f"{' or '.join(map(repr, allowed))}."
        )


def _llava_layers_read(config: Any) -> int:
    """Return how many layers stand before what LLaVA reads; CheckpointError where it reads several."""
    read = config.vision_feature_layer
    if not isinstance(read, int):
        raise CheckpointError(
            f"config.json states vision_feature_layer as a list (layers {read}); one is written into a GGUF file. "
            "Use the ONNX export, which concatenates them."
        )
    return read


def _llava_keys(writer: Any, config: Any) -> None:
    tower = config.vision_config
    _wanted(tower, "hidden_act", "quick_gelu")
    _wanted(config, "vision_feature_select_strategy", "default")
    _wanted(config, "projector_hidden_act", "gelu")
    writer.add_vision_image_size(tower.image_size)
    writer.add_vision_head_count(tower.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(tower.layer_norm_eps)
    # the output of so many layers; without it llama.cpp would leave out the last of those that are there
    writer.add_array("clip.vision.feature_layer", [_llava_layers_read(config)])


def _qwen_keys(writer: Any, config: Any) -> None:
    tower = config.vision_config
    _wanted(tower, "hidden_act", "silu")
    _wanted(tower, "window_size", QWEN_WINDOW)
    _wanted(tower, "spatial_merge_size", 2)
    full = list(tower.fullatt_block_indexes)
    pattern = full[0] + 1 if full else 0
    if not full or full != list(range(pattern - 1, tower.depth, pattern)):
        raise CheckpointError(
            f"config.json states full attention in layers {full} of {tower.depth}; llama.cpp knows every n-th only."
        )
    writer.add_vision_image_size(560)  # of no effect: sizes are free
    writer.add_vision_head_count(tower.num_heads)
    writer.add_vision_attention_layernorm_eps(1e-6)
    writer.add_vision_use_silu(True)
    writer.add_vision_n_wa_pattern(pattern)
    writer.add_vision_spatial_merge_size(tower.spatial_merge_size)


def _gemma_keys(writer: Any, config: Any) -> None:
    tower = config.vision_config
    _wanted(tower, "hidden_act", "gelu_pytorch_tanh")
    writer.add_vision_image_size(tower.image_size)
    writer.add_vision_head_count(tower.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(tower.layer_norm_eps)
    writer.add_vision_use_gelu(True)
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
        layers_read=_llava_layers_read,
        set_keys=_llava_keys,
        # only CLIP's pooled output reads it, and llama.cpp would apply it to the projector's input
        optional=(f"{TOWER}post_layernorm.weight", f"{TOWER}post_layernorm.bias"),
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
