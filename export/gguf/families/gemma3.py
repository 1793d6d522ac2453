"""Gemma-3 in llama.cpp: ``gemma3`` with the projector ``gemma3``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from export.gguf.families.family import GgufFamily, GgufLanguage, GgufVision, Part
from export.gguf.families.vit import PROJECTOR, TOWER, VIT_LAYER, check_side, set_activation, with_leaves
from safevlm.checkpoint.families import GEMMA3 as FACTS
from safevlm.errors import CheckpointError

__all__ = ["GEMMA3"]

LAYERS_27B = 62
"""llama.cpp tells Gemma-3 27B by it, whose attention is scaled by the width of heads if they shared the model's."""
TANH_GELU = ("gelu_pytorch_tanh", "gelu_new")
SLIDING = "sliding_attention"
TOKEN_NORM = f"{PROJECTOR}mm_soft_emb_norm.weight"


def _change(name: str, tensor: Tensor, text: Any) -> Tensor:
    """Gemma's norms multiply by one more than their weight; llama.cpp's multiply by the weight.

    What attention is scaled by is llama.cpp's own choice; what it differs by goes into the norm of queries.
    """
    if not name.endswith("norm.weight"):
        return tensor
    weight = tensor.float() + FACTS.norm_offset
    return weight * _scale(text) if name.endswith("q_norm.weight") else weight


def _scale(text: Any) -> float:
    shared = text.hidden_size // text.num_attention_heads
    scaled_by = shared if text.num_hidden_layers == LAYERS_27B else text.head_dim
    return math.sqrt(scaled_by / text.query_pre_attn_scalar)


def _language_keys(writer: Any, text: Any) -> None:
    writer.add_key_length(text.head_dim)
    writer.add_value_length(text.head_dim)
    if SLIDING in text.layer_types:
        writer.add_sliding_window(text.sliding_window)
        writer.add_sliding_window_pattern([kind == SLIDING for kind in text.layer_types])
        writer.add_rope_freq_base_swa(text.rope_parameters[SLIDING]["rope_theta"])
    if text.final_logit_softcapping is not None:
        writer.add_final_logit_softcapping(text.final_logit_softcapping)


def _check(text: Any) -> None:
    for key in ("attn_logit_softcapping", "use_bidirectional_attention"):
        if getattr(text, key, None):
            raise CheckpointError(
                f"config.json states {key} = {getattr(text, key)}, which llama.cpp's gemma3 does not support. "
                "Use another runtime."
            )
    unknown = sorted({*text.layer_types} - {SLIDING, "full_attention"})
    if unknown:
        raise CheckpointError(
            f"config.json states layers of {unknown[0]}; llama.cpp's gemma3 supports only sliding and full attention."
        )
    if SLIDING in text.layer_types and not (text.sliding_window or 0) > 0:
        raise CheckpointError(
            f"config.json states sliding_window = {text.sliding_window} for sliding layers; it must be at least 1."
        )
    if not text.query_pre_attn_scalar > 0:
        raise CheckpointError(
            f"config.json states query_pre_attn_scalar = {text.query_pre_attn_scalar}; it must be above 0."
        )


def _vision_keys(writer: Any, config: Any) -> None:
    tower = config.vision_config
    set_activation(writer, tower)
    writer.add_vision_image_size(tower.image_size)
    writer.add_vision_head_count(tower.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(tower.layer_norm_eps)
    writer.add_vision_projector_scale_factor(
        tower.image_size // tower.patch_size // math.isqrt(config.mm_tokens_per_image)
    )


def _layers_read(config: Any) -> int:
    return int(config.vision_config.num_hidden_layers)


def _token_norm(_: Any, place: str, shape: tuple[int, ...]) -> Iterator[Part]:
    yield Part(place, shape, lambda tensor: tensor.float() + FACTS.norm_offset)


GEMMA3 = GgufFamily(
    language=GgufLanguage(
        architecture="gemma3",
        change=_change,
        set_keys=_language_keys,
        check=_check,
        activations=TANH_GELU,
        unread=(".o_proj.bias",),
    ),
    vision=GgufVision(
        projector="gemma3",
        layer_prefix=f"{TOWER}encoder.layers.",
        layer=VIT_LAYER,
        others={
            f"{TOWER}embeddings.position_embedding.weight": "v.position_embd.weight",
            **with_leaves(
                {f"{TOWER}embeddings.patch_embedding": "v.patch_embd", f"{TOWER}post_layernorm": "v.post_ln"}
            ),
            f"{PROJECTOR}mm_input_projection_weight": "mm.input_projection.weight",
            TOKEN_NORM: "mm.soft_emb_norm.weight",
        },
        changed={TOKEN_NORM: _token_norm},
        set_keys=_vision_keys,
        layers_read=_layers_read,
        check_size=check_side,
    ),
)
