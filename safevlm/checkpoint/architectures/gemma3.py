"""Gemma-3 in transformers: ``Gemma3Model`` with a SigLIP tower, and its config from every layout."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Model,
    Gemma3TextConfig,
    SiglipVisionConfig,
)
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding

from safevlm.checkpoint.architectures.architecture import Architecture
from safevlm.checkpoint.configs.older_configs import check_image_in_window, version_of
from safevlm.checkpoint.configs.stated_shapes import Shapes, default_of
from safevlm.checkpoint.configs.text_section import known_keys, nested_section, text_section
from safevlm.checkpoint.configs.vit_section import VISION_TOWER, check_vit_heads, vit_section
from safevlm.errors import CheckpointError
from safevlm.network.geometry import SquareGeometry

__all__ = ["GEMMA3"]


def _config(raw: Mapping[str, Any], shapes: Shapes) -> Gemma3Config:
    text = text_section(
        raw, (Gemma3Config, Gemma3TextConfig), shapes, shows_heads=True, whole=("query_pre_attn_scalar",)
    )
    vision = known_keys(nested_section(raw, "vision_config") or {}, SiglipVisionConfig)
    gaps = vit_section(vision, SiglipVisionConfig, shapes, class_tokens=0)
    layers = VISION_TOWER + "encoder.layers."
    gaps += shapes.layers(vision, "vision_config.", "num_hidden_layers", layers, SiglipVisionConfig)
    check_vit_heads(vision, SiglipVisionConfig, shapes, gaps)
    projector = "model.multi_modal_projector.mm_input_projection_weight"
    text.setdefault("hidden_size", shapes.need(projector)[1])
    shapes.check(projector, (vision["hidden_size"], text["hidden_size"]), "hidden_size of tower and language model")
    tokens = shapes.whole(dict(raw), "", "mm_tokens_per_image", default_of(Gemma3Config, "mm_tokens_per_image"))
    side, grid = math.isqrt(tokens), vision["image_size"] // vision["patch_size"]
    if side * side != tokens or grid % side:
        raise CheckpointError(
            f"{shapes.source}: config.json states mm_tokens_per_image = {tokens}; it must be a square number whose "
            f"root divides the {grid}x{grid} grid of patches. Correct config.json."
        )
    check_image_in_window(text, version_of(raw), tokens, Gemma3TextConfig, shapes.source)
    indices = ("boi_token_index", "eoi_token_index", "image_token_index")
    vision["vision_use_head"] = False  # the pooling head is never read, whether it is stored or not
    return Gemma3Config(
        text_config=Gemma3TextConfig(**text),
        vision_config=SiglipVisionConfig(**vision),
        mm_tokens_per_image=tokens,
        tie_word_embeddings=text["tie_word_embeddings"],
        **{key: raw[key] for key in indices if raw.get(key) is not None},
    )


def _geometry(config: Any) -> SquareGeometry:
    return SquareGeometry(config.vision_config.image_size, int(config.mm_tokens_per_image or 0))


GEMMA3 = Architecture(
    config_class=Gemma3Config,
    build_config=_config,
    inner_class=Gemma3Model,
    whole_class=Gemma3ForConditionalGeneration,
    rotary_class=Gemma3RotaryEmbedding,
    rotary_by_layer_type=True,
    processor_class="Gemma3Processor",
    placeholders=lambda config: {"image_seq_length": config.mm_tokens_per_image},
    geometry=_geometry,
    images_see_themselves=True,
)
