"""LLaVA in llama.cpp: ``llama`` with the projector ``mlp``."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from export.gguf.families.family import GgufFamily, GgufLanguage, GgufVision, Part, head_width
from export.gguf.families.vit import GELU, PROJECTOR, TOWER, VIT_LAYER, check_side, require, set_activation, with_leaves
from runtimes.language.llamacpp_first_patch import FEATURE_LAYERS_KEY

__all__ = ["LLAVA"]


def _change(name: str, tensor: Tensor, text: Any) -> Tensor:
    """Put the two halves of a rotary head side by side: llama.cpp turns neighbours, transformers turns halves."""
    if ".q_proj." in name:
        return _interleaved(tensor, text.num_attention_heads)
    if ".k_proj." in name:
        return _interleaved(tensor, text.num_key_value_heads)
    return tensor


def _interleaved(tensor: Tensor, heads: int) -> Tensor:
    """Reorder the rows of a weight, or the numbers of a bias, head by head."""
    return tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, -1).transpose(1, 2).reshape(tensor.shape)


def _language_keys(writer: Any, text: Any) -> None:
    writer.add_rope_dimension_count(head_width(text))
    writer.add_key_length(head_width(text))
    writer.add_value_length(head_width(text))


def _feature_layers(config: Any) -> tuple[int, ...]:
    """Return the hidden states that LLaVA's projector reads side by side, counted from the first layer."""
    stated = config.vision_feature_layer
    last = config.vision_config.num_hidden_layers
    layers = [stated] if isinstance(stated, int) else list(stated)
    return tuple(layer if layer >= 0 else last + 1 + layer for layer in layers)


def _vision_keys(writer: Any, config: Any) -> None:
    tower = config.vision_config
    require(config, "vision_feature_select_strategy", "default")
    require(config, "projector_hidden_act", *GELU)
    set_activation(writer, tower)
    writer.add_vision_image_size(tower.image_size)
    writer.add_vision_head_count(tower.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(tower.layer_norm_eps)
    # the output of so many layers; without it llama.cpp would leave out the last of those that are there
    writer.add_array(FEATURE_LAYERS_KEY, sorted({*_feature_layers(config)}))


def _layers_read(config: Any) -> int:
    return max(_feature_layers(config))


def _first_linear(config: Any, place: str, shape: tuple[int, ...]) -> Iterator[Part]:
    layers = _feature_layers(config)
    width = shape[1] // len(layers) * len(set(layers))
    yield Part(place, (shape[0], width), partial(_by_layer, layers))


def _by_layer(layers: tuple[int, ...], tensor: Tensor) -> Tensor:
    """Put columns, a block a layer that is read, in llama.cpp's order: from the first layer, each once."""
    if len(layers) == 1:
        return tensor
    blocks = tensor.float().chunk(len(layers), dim=1)
    each = (sum(block for block, at in zip(blocks, layers, strict=True) if at == layer) for layer in sorted({*layers}))
    return torch.cat(tuple(cast(Iterator[Tensor], each)), dim=1)


LLAVA = GgufFamily(
    language=GgufLanguage(
        architecture="llama", change=_change, set_keys=_language_keys, takes_factors=True, space_prefix=True
    ),
    vision=GgufVision(
        projector="mlp",
        layer_prefix=f"{TOWER}encoder.layers.",
        layer=VIT_LAYER,
        others={
            f"{TOWER}embeddings.class_embedding": "v.class_embd",
            f"{TOWER}embeddings.patch_embedding.weight": "v.patch_embd.weight",
            f"{TOWER}embeddings.position_embedding.weight": "v.position_embd.weight",
            **with_leaves(
                {
                    f"{TOWER}pre_layrnorm": "v.pre_ln",
                    f"{PROJECTOR}linear_1": "mm.0",
                    f"{PROJECTOR}linear_2": "mm.2",
                }
            ),
        },
        changed={f"{PROJECTOR}linear_1.weight": _first_linear},
        pooled=(f"{TOWER}post_layernorm.",),
        biases={"mm.0.bias": "mm.0.weight", "mm.2.bias": "mm.2.weight"},
        set_keys=_vision_keys,
        layers_read=_layers_read,
        check_size=check_side,
        class_token=True,
    ),
)
