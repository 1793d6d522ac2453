"""Refuse what transformers' config classes take and its models then cannot compute.

The classes check the types of their own fields. They do not look into the rotary settings, take NaN, infinity and
numbers of any size, and names that nothing answers to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from safevlm.checkpoint.configs.stated_shapes import MAX_COUNT, Section, shown
from safevlm.errors import CheckpointError

if TYPE_CHECKING:
    from safevlm.checkpoint.architectures.architecture import Architecture

__all__ = ["check_language", "check_section", "check_vision"]

LAYER_TYPES = ("full_attention", "sliding_attention")
ACTIVATIONS = ("hidden_act", "hidden_activation", "projector_hidden_act")
UNCOMPUTABLE = (ArithmeticError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""What transformers' rotary modules end in when a setting is missing, of a wrong type or of a wrong length."""


def check_section(section: Section, where: str, source: str) -> None:
    """Refuse NaN, infinity, numbers beyond counting and activations that do not exist. Raises CheckpointError."""
    for key, value in section.items():
        if isinstance(value, float) and not math.isfinite(value):
            _refuse(source, f"{where}{key}", value, "a finite number")
        if isinstance(value, int) and abs(value) > MAX_COUNT:
            if key != "rope_theta":
                _refuse(source, f"{where}{key}", value, f"a number up to {MAX_COUNT}")
            section[key] = float(value) if value < 10**300 else math.inf  # torch's powers take no such integers
        if key in ACTIVATIONS and value not in ACT2FN:
            _refuse(source, f"{where}{key}", value, "an activation that transformers has ('silu', 'gelu', …)")


def _refuse(source: str, key: str, value: object, allowed: str) -> None:
    raise CheckpointError(
        f"{source}: config.json states {key} = {shown(value)}; {allowed} is allowed. "
        "Compare it with the base model's config.json."
    )


def check_language(config: Any, architecture: Architecture, source: str) -> None:
    """Refuse a language model whose rotary embedding or attention windows cannot be computed.

    Raises CheckpointError.
    """
    text = config.text_config
    kinds = getattr(text, "layer_types", None) or []
    unknown = sorted(set(kinds) - set(LAYER_TYPES))
    if unknown or (kinds and len(kinds) != text.num_hidden_layers):
        _refuse(source, "layer_types", kinds, f"{text.num_hidden_layers} of {' and '.join(LAYER_TYPES)}")
    window = getattr(text, "sliding_window", None)
    if "sliding_attention" in kinds and (type(window) is not int or window < 1):
        _refuse(source, "sliding_window", window, "a whole number above 0")
    rope = text.rope_parameters
    for section in (rope, *(value for value in rope.values() if isinstance(value, Mapping))):
        kind = section.get("rope_type", "default")
        if kind not in ("default", *ROPE_INIT_FUNCTIONS):
            raise CheckpointError(
                f"{source}: config.json asks for the unknown rotary embedding {shown(kind)}. Allowed: 'default', "
                f"{', '.join(repr(name) for name in sorted(ROPE_INIT_FUNCTIONS))}. Correct rope_scaling."
            )
    _check_frequencies(text, architecture, source)


def _check_frequencies(text: Any, architecture: Architecture, source: str) -> None:
    """Compute what the rotary embedding makes of two positions, and require numbers, one for each place of a head."""
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kinds = sorted(set(text.layer_types)) if architecture.rotary_by_layer_type else []
    positions = torch.arange(2)[None]
    if architecture.axes > 1:
        positions = positions.expand(architecture.axes, 1, 2)
    try:
        rotary = architecture.rotary_class(config=text)
        each: list[tuple[str, ...]] = [(kind,) for kind in kinds] or [()]
        turns = [rotary(torch.zeros(1), positions, *kind) for kind in each]
    except UNCOMPUTABLE as error:
        raise CheckpointError(
            f"{source}: config.json's rotary settings {shown(text.rope_parameters)} cannot be computed "
            f"({type(error).__name__}: {shown(str(error))}). Correct rope_theta and rope_scaling."
        ) from error
    for cos, sin in turns:
        if cos.shape[-1] != head_dim or not bool((cos.isfinite() & sin.isfinite()).all()):
            raise CheckpointError(
                f"{source}: config.json's rotary settings {shown(text.rope_parameters)} give {cos.shape[-1]} values "
                f"for heads of width {head_dim}, or values that are not finite. Correct rope_theta and rope_scaling."
            )


def check_vision(config: Any, architecture: Architecture, source: str) -> None:
    """Refuse a vision tower whose rotary embedding cannot be computed. Raises CheckpointError."""
    if architecture.vision_rotary_class is None:
        return
    tower: Any = config.vision_config
    try:
        rotary: Any = architecture.vision_rotary_class(config=tower)
        finite = bool(rotary.inv_freq.isfinite().all())
    except UNCOMPUTABLE as error:
        raise CheckpointError(
            f"{source}: config.json's vision_config.rope_parameters = {shown(tower.rope_parameters)} cannot be "
            f"computed ({type(error).__name__}: {shown(str(error))}). Remove the key, as published checkpoints do."
        ) from error
    if not finite:
        _refuse(source, "vision_config.rope_parameters", tower.rope_parameters, "a rope_theta above 0")
