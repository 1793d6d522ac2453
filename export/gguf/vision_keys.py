"""The metadata of llama.cpp's ``mmproj`` file, and what its graphs of vision towers do not compute.

Source: ``clip.cpp``, ``clip-impl.h`` and ``models/`` of llama.cpp's ``tools/mtmd``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from transformers import LlavaConfig, Qwen2_5_VLConfig

from runtimes.language.llamacpp_first_patch import FEATURE_LAYERS_KEY
from safevlm.checkpoint.checkpoint import Checkpoint
from safevlm.checkpoint.configs.transformers_config import TransformersConfig, build_vision_config
from safevlm.contract.preprocessing import Preprocessing
from safevlm.errors import CheckpointError, InputError

__all__ = ["feature_layers", "layers_read", "vision_keys"]

QWEN_WINDOW = 112
"""Pixels; fixed in llama.cpp."""
QWEN_TOKENS = (8, 4096)
"""Image tokens that llama.cpp's Qwen2.5-VL takes without resizing the image."""
LARGEST_SIDE = 8192
GELU = ("gelu", "gelu_pytorch_tanh", "gelu_new")


def vision_keys(checkpoint: Checkpoint, preprocessing: Preprocessing, writer: Any) -> None:
    """Set the metadata of the projector file.

    Errors: CheckpointError for a tower that llama.cpp's graph does not compute.
    """
    config = build_vision_config(checkpoint)
    tower: Any = config.vision_config
    projector, set_keys = _FAMILIES[checkpoint.family.key]
    writer.add_type("mmproj")
    writer.add_name(checkpoint.name)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(projector)
    writer.add_vision_projection_dim(checkpoint.hidden_size)
    writer.add_vision_patch_size(tower.patch_size)
    writer.add_vision_embedding_length(tower.hidden_size)
    writer.add_vision_feed_forward_length(tower.intermediate_size)
    writer.add_vision_block_count(layers_read(config))
    grey = 255 * preprocessing.rescale  # llama.cpp divides grey levels by 255
    writer.add_vision_image_mean([value / grey for value in preprocessing.mean])
    writer.add_vision_image_std([value / grey for value in preprocessing.std])
    set_keys(writer, config)
    _check_tower(checkpoint, tower, preprocessing)


def layers_read(config: TransformersConfig) -> int:
    """Return how many of the tower's layers the projector's input depends on."""
    tower: Any = config.vision_config
    if isinstance(config, LlavaConfig):
        return max(feature_layers(config))
    return int(tower.depth if isinstance(config, Qwen2_5_VLConfig) else tower.num_hidden_layers)


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


def feature_layers(config: Any) -> tuple[int, ...]:
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
    writer.add_array(FEATURE_LAYERS_KEY, sorted({*feature_layers(config)}))


def _qwen_keys(writer: Any, config: Any) -> None:
    tower = config.vision_config
    _wanted(tower, "hidden_act", "silu")
    _wanted(tower, "window_size", QWEN_WINDOW)
    _wanted(tower, "spatial_merge_size", 2)
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


_FAMILIES: Mapping[str, tuple[str, Callable[[Any, Any], None]]] = {
    "llava": ("mlp", _llava_keys),
    "qwen2_5_vl": ("qwen2.5vl_merger", _qwen_keys),
    "gemma3": ("gemma3", _gemma_keys),
}
"""llama.cpp's name of the projector, and the keys of its own, by our families' keys."""
