"""A guard with seeded random weights at a real model's shape: for speed, size and memory, never for verdicts.

The head stands on the projector's output, wherever the real guard taps: it is the engine that gates before the
language model runs. Modules, reference path and graph are those of a real checkpoint.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3Model,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLModel,
    SiglipVisionConfig,
)

from benchmarks.shapes.shapes import VisionShape
from safevlm.checkpoint.configs.processor_config import read_processor
from safevlm.checkpoint.configs.transformers_config import TransformersConfig
from safevlm.checkpoint.families import FAMILIES
from safevlm.checkpoint.guard_head import standard_classes
from safevlm.network.filling import on_meta
from safevlm.network.head import GuardHead
from safevlm.network.reference import GuardModel, VisionPath

__all__ = ["build_random_guard", "fill_randomly"]


def build_random_guard(shape: VisionShape, *, seed: int) -> GuardModel:
    """Return a float32 guard at ``shape``; the same seed gives the same weights in every process."""
    family = FAMILIES[shape.family]
    lay_out, model_class = _FAMILIES[shape.family]
    config = lay_out(shape)
    config._attn_implementation = "sdpa"
    core = on_meta(lambda: model_class(copy.deepcopy(config)))
    del core.language_model
    preprocessing = read_processor(family.preprocessing, family=family.key)
    head = on_meta(lambda: GuardHead(shape.head_widths))
    guard = GuardModel(VisionPath(core, config, preprocessing), head, family, standard_classes())
    fill_randomly(guard, seed)
    return guard.eval()


def fill_randomly(module: nn.Module, seed: int) -> None:
    """Draw matrices with variance 1 / inputs, which keeps activations finite; norms are 1, biases 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, slot in list(module.named_parameters()):
        path, _, leaf = name.rpartition(".")
        if slot.ndim > 1:
            value = torch.empty(slot.shape).normal_(0, slot[0].numel() ** -0.5, generator=generator)
        else:
            value = torch.full(slot.shape, 1.0 if leaf == "weight" else 0.0)
        setattr(module.get_submodule(path), leaf, nn.Parameter(value, requires_grad=False))


def _llava(shape: VisionShape) -> LlavaConfig:
    return LlavaConfig(
        text_config=LlamaConfig(hidden_size=shape.hidden_size, num_hidden_layers=1),
        vision_config=CLIPVisionConfig(**shape.config, num_hidden_layers=shape.layers),
        vision_feature_layer=shape.layers_read,
    )


def _qwen2_5_vl(shape: VisionShape) -> Qwen2_5_VLConfig:
    full = [layer for layer in shape.config["fullatt_block_indexes"] if layer < shape.layers]
    vision = {**shape.config, "fullatt_block_indexes": full, "depth": shape.layers}
    return Qwen2_5_VLConfig(
        text_config={"hidden_size": shape.hidden_size, "num_hidden_layers": 1},
        vision_config={**vision, "out_hidden_size": shape.hidden_size},
    )


def _gemma3(shape: VisionShape) -> Gemma3Config:
    return Gemma3Config(
        text_config=Gemma3TextConfig(hidden_size=shape.hidden_size, num_hidden_layers=1),
        vision_config=SiglipVisionConfig(**shape.config, num_hidden_layers=shape.layers),
        mm_tokens_per_image=256,
    )


_FAMILIES: dict[str, tuple[Callable[[VisionShape], TransformersConfig], Callable[[Any], Any]]] = {
    "llava": (_llava, LlavaModel),
    "qwen2_5_vl": (_qwen2_5_vl, Qwen2_5_VLModel),
    "gemma3": (_gemma3, Gemma3Model),
}
