"""transformers' configs at the shapes of real models, a function a family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    Qwen2_5_VLConfig,
    SiglipVisionConfig,
)

from benchmarks.shapes.shapes import VisionShape

__all__ = ["config_at"]


def config_at(shape: VisionShape, **text: Any) -> Any:
    """Return transformers' config at ``shape``, of a language model with these settings."""
    config = _CONFIGS[shape.family](shape, {**text, "hidden_size": shape.hidden_size})
    config._attn_implementation = "sdpa"
    return config


def _llava(shape: VisionShape, text: dict[str, Any]) -> LlavaConfig:
    return LlavaConfig(
        text_config=LlamaConfig(**text),
        vision_config=CLIPVisionConfig(**shape.config, num_hidden_layers=shape.layers),
        vision_feature_layer=shape.layers_read,
    )


def _qwen2_5_vl(shape: VisionShape, text: dict[str, Any]) -> Qwen2_5_VLConfig:
    full = [layer for layer in shape.config["fullatt_block_indexes"] if layer < shape.layers]
    vision = {**shape.config, "fullatt_block_indexes": full, "depth": shape.layers}
    rope = {"type": "mrope", "mrope_section": [16, 24, 24]}
    return Qwen2_5_VLConfig(
        text_config={**text, "rope_scaling": rope, "rope_theta": 1e6, "rms_norm_eps": 1e-6},
        vision_config={**vision, "out_hidden_size": shape.hidden_size},
        tie_word_embeddings=False,
    )


def _gemma3(shape: VisionShape, text: dict[str, Any]) -> Gemma3Config:
    width: dict[str, Any] = {"head_dim": 128 if shape.hidden_size == 5376 else 256}
    return Gemma3Config(
        text_config=Gemma3TextConfig(**text, **width, query_pre_attn_scalar=_scalar(text, width), sliding_window=1024),
        vision_config=SiglipVisionConfig(**shape.config, num_hidden_layers=shape.layers),
        mm_tokens_per_image=256,
    )


def _scalar(text: dict[str, Any], width: dict[str, Any]) -> int:
    """Return what the 27B scales its attention by, 5376 / 32; cut to fewer layers it is what llama.cpp takes."""
    whole = text["hidden_size"] == 5376 and text["num_hidden_layers"] == 62
    return 168 if whole else int(width["head_dim"])


_CONFIGS: dict[str, Callable[[VisionShape, dict[str, Any]], Any]] = {
    "llava": _llava,
    "qwen2_5_vl": _qwen2_5_vl,
    "gemma3": _gemma3,
}
"""By the families' keys."""
