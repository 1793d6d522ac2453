"""A whole Safe-VLM with seeded random weights at a real model's shape, cut to a few layers: for speed alone.

The tokenizer is the family's tiny checkpoint's: prompts are about as long as a real one's, and every id is in range.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    SiglipVisionConfig,
)

from benchmarks.shapes.random_guard import fill_randomly
from benchmarks.shapes.shapes import VisionShape
from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.checkpoint.configs.processor_config import read_processor
from safevlm.checkpoint.families import FAMILIES
from safevlm.checkpoint.family import TapSource
from safevlm.checkpoint.guard_head import standard_classes
from safevlm.network.filling import on_meta
from safevlm.network.head import GuardHead
from safevlm.network.prompt_tokens import load_tokenizer
from safevlm.network.safe_vlm import SafeVLM

__all__ = ["build_random_vlm", "config_and_class"]


def build_random_vlm(shape: VisionShape, *, layers: int, seed: int) -> SafeVLM:
    """Return a float32 model at ``shape`` with so many language-model layers; of the tower the shape's own."""
    config, model_class, tokenizer = config_and_class(shape, layers)
    tap = _FAMILIES[shape.family][3]
    model: Any = on_meta(lambda: model_class(config))
    head = on_meta(lambda: GuardHead(shape.head_widths))
    fill_randomly(model, seed)
    fill_randomly(head, seed)
    if config.tie_word_embeddings:
        model.tie_weights()
    family = FAMILIES[shape.family]
    return SafeVLM(
        model,
        head,
        family=family,
        classes=standard_classes(),
        tap_source=tap,
        preprocessing=read_processor(family.preprocessing, family=family.key),
        tokenizer=load_tokenizer(open_checkpoint(tokenizer).folder),
    ).eval()


def config_and_class(shape: VisionShape, layers: int) -> tuple[Any, Callable[[Any], Any], str]:
    """Return transformers' config and class at ``shape``, and the tiny checkpoint that lends its tokenizer."""
    lay_out, model_class, tokenizer, _ = _FAMILIES[shape.family]
    text = {**shape.language, "hidden_size": shape.hidden_size, "num_hidden_layers": layers}
    config = lay_out(shape, text)
    config._attn_implementation = "sdpa"
    return config, model_class, tokenizer


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


_FAMILIES: dict[str, tuple[Callable[[VisionShape, dict[str, Any]], Any], Callable[[Any], Any], str, TapSource]] = {
    "llava": (_llava, LlavaForConditionalGeneration, "tiny-safellava", "language_model"),
    "qwen2_5_vl": (_qwen2_5_vl, Qwen2_5_VLForConditionalGeneration, "tiny-safeqwen", "language_model"),
    "gemma3": (_gemma3, Gemma3ForConditionalGeneration, "tiny-safegem", "projector"),
}
