"""A whole Safe-VLM with seeded random weights at a real model's shape, cut to a few layers: for speed alone.

The tokenizer is the family's tiny checkpoint's: prompts are about as long as a real one's, and every id is in range.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.shapes.configs import config_at
from benchmarks.shapes.random_guard import fill_randomly
from benchmarks.shapes.shapes import VisionShape
from safevlm.checkpoint.architectures import ARCHITECTURES
from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.checkpoint.configs.processor_config import read_processor
from safevlm.checkpoint.families import FAMILIES
from safevlm.checkpoint.guard_head import standard_classes
from safevlm.network.filling import on_meta
from safevlm.network.head import GuardHead
from safevlm.network.prompt_tokens import load_tokenizer
from safevlm.network.safe_vlm import SafeVLM

__all__ = ["build_random_vlm", "config_and_class"]


def build_random_vlm(shape: VisionShape, *, layers: int, seed: int) -> SafeVLM:
    """Return a float32 model at ``shape`` with so many language-model layers; of the tower the shape's own."""
    config, model_class = config_and_class(shape, layers)
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
        tap_source=family.default_tap,
        preprocessing=read_processor(family.preprocessing, family=family.key),
        tokenizer=load_tokenizer(open_checkpoint(family.tiny).folder),
    ).eval()


def config_and_class(shape: VisionShape, layers: int) -> tuple[Any, Callable[[Any], Any]]:
    """Return transformers' config and class at ``shape``, with so many language-model layers."""
    config = config_at(shape, **{**(shape.language or {}), "num_hidden_layers": layers})
    return config, ARCHITECTURES[shape.family].whole_class
