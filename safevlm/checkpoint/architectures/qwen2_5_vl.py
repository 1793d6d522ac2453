"""Qwen2.5-VL in transformers: ``Qwen2_5_VLModel``, and its config from every layout."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLModel
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import (
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLVisionConfig,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLRotaryEmbedding,
    Qwen2_5_VLVisionRotaryEmbedding,
)

from safevlm.checkpoint.architectures.architecture import Architecture
from safevlm.checkpoint.configs.config_checks import check_section
from safevlm.checkpoint.configs.stated_shapes import Section, Shapes, Width, default_of
from safevlm.checkpoint.configs.text_section import known_keys, nested_section, text_section
from safevlm.errors import CheckpointError
from safevlm.network.geometry import QwenGeometry
from safevlm.network.positions import axial_positions

__all__ = ["QWEN2_5_VL"]

MAX_WINDOW = 16384
"""Of Qwen2.5-VL's vision tower, in pixels: the grid is padded to whole windows."""
VISION_WIDTHS = (
    Width("hidden_size", "model.visual.patch_embed.proj.weight", 0),
    Width("in_channels", "model.visual.patch_embed.proj.weight", 1),
    Width("temporal_patch_size", "model.visual.patch_embed.proj.weight", 2),
    Width("patch_size", "model.visual.patch_embed.proj.weight", 4),
    Width("intermediate_size", "model.visual.blocks.0.mlp.gate_proj.weight", 0),
    Width("out_hidden_size", "model.visual.merger.mlp.2.weight", 0),
)


def _config(raw: Mapping[str, Any], shapes: Shapes) -> Qwen2_5_VLConfig:
    text = text_section(raw, (Qwen2_5_VLConfig, Qwen2_5_VLTextConfig), shapes)
    vision = _vision_section(raw, shapes)
    text.setdefault("hidden_size", vision["out_hidden_size"])
    projector = "model.visual.merger.mlp.2.weight"
    shapes.check(projector, (text["hidden_size"], shapes.need(projector)[1]), "hidden_size of the language model")
    indices = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return Qwen2_5_VLConfig(
        text_config=Qwen2_5_VLTextConfig(**text),
        vision_config=Qwen2_5_VLVisionConfig(**vision),
        tie_word_embeddings=text["tie_word_embeddings"],
        **{key: raw[key] for key in indices if raw.get(key) is not None},
    )


def _vision_section(raw: Mapping[str, Any], shapes: Shapes) -> Section:
    where, own_class = "vision_config.", Qwen2_5_VLVisionConfig
    vision = known_keys(nested_section(raw, "vision_config") or {}, own_class)
    gaps = shapes.settle(vision, where, VISION_WIDTHS, own_class)
    gaps += shapes.layers(vision, where, "depth", "model.visual.blocks.", own_class)
    merger = "model.visual.merger.mlp.0.weight"
    usual = default_of(own_class, "spatial_merge_size")
    if "spatial_merge_size" not in vision and shapes.need(merger)[0] != vision["hidden_size"] * usual**2:
        vision["spatial_merge_size"] = math.isqrt(shapes.need(merger)[0] // vision["hidden_size"])
        gaps.append(f"{where}spatial_merge_size ('{merger}' shows another than the default, {usual})")
    merge = shapes.whole(vision, where, "spatial_merge_size", usual)
    merged = vision["hidden_size"] * merge**2
    shapes.check(merger, (merged, merged), f"{where}spatial_merge_size = {merge}")
    shapes.need_stated(vision, where, ["num_heads", "window_size", "fullatt_block_indexes"], gaps)
    heads = shapes.whole(vision, where, "num_heads", default_of(own_class, "num_heads"))
    window = shapes.whole(vision, where, "window_size", default_of(own_class, "window_size"))
    if vision["hidden_size"] % (4 * heads):
        raise CheckpointError(
            f"{shapes.source}: {where}num_heads = {heads} does not divide hidden_size = {vision['hidden_size']} into "
            "heads whose width is a multiple of 4. Correct config.json."
        )
    if window < merge * vision["patch_size"] or window > MAX_WINDOW:
        raise CheckpointError(
            f"{shapes.source}: config.json states {where}window_size = {window}; {merge * vision['patch_size']} to "
            f"{MAX_WINDOW} pixels are allowed (Qwen2.5-VL: 112)."
        )
    check_section(vision, where, shapes.source)
    return vision


def _geometry(config: Any) -> QwenGeometry:
    vision = config.vision_config
    return QwenGeometry(vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)


QWEN2_5_VL = Architecture(
    config_class=Qwen2_5_VLConfig,
    build_config=_config,
    inner_class=Qwen2_5_VLModel,
    whole_class=Qwen2_5_VLForConditionalGeneration,
    rotary_class=Qwen2_5_VLRotaryEmbedding,
    vision_rotary_class=Qwen2_5_VLVisionRotaryEmbedding,
    tower="visual",
    projector="visual.merger",
    processor_class="Qwen2_5_VLProcessor",
    geometry=_geometry,
    axes=3,
    positions=axial_positions,
)
