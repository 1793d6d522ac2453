"""A guard with seeded random weights at a real model's shape: for speed, size and memory, never for verdicts.

The head stands on the projector's output, wherever the real guard taps: it is the engine that gates before the
language model runs. Modules, reference path and graph are those of a real checkpoint.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from benchmarks.shapes.configs import config_at
from benchmarks.shapes.shapes import VisionShape
from safevlm.checkpoint.architectures import ARCHITECTURES
from safevlm.checkpoint.configs.processor_config import read_processor
from safevlm.checkpoint.families import FAMILIES
from safevlm.checkpoint.guard_head import standard_classes
from safevlm.network.filling import on_meta
from safevlm.network.head import GuardHead
from safevlm.network.reference import GuardModel, VisionPath

__all__ = ["build_random_guard", "fill_randomly"]


def build_random_guard(shape: VisionShape, *, seed: int) -> GuardModel:
    """Return a float32 guard at ``shape``; the same seed gives the same weights in every process."""
    family = FAMILIES[shape.family]
    config = config_at(shape, num_hidden_layers=1)
    core = on_meta(lambda: ARCHITECTURES[shape.family].inner_class(copy.deepcopy(config)))
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
