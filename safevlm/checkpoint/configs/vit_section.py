"""The section of a config that describes a CLIP or SigLIP tower, settled by the tower's tensors."""

from __future__ import annotations

import math

from safevlm.checkpoint.configs.config_checks import check_section
from safevlm.checkpoint.configs.stated_shapes import Section, Shapes, Width, default_of
from safevlm.errors import CheckpointError

__all__ = ["VISION_TOWER", "check_vit_heads", "vit_section"]

VISION_TOWER = "model.vision_tower."
VIT_WIDTHS = (
    Width("hidden_size", VISION_TOWER + "embeddings.patch_embedding.weight", 0),
    Width("num_channels", VISION_TOWER + "embeddings.patch_embedding.weight", 1),
    Width("patch_size", VISION_TOWER + "embeddings.patch_embedding.weight", 3),
    Width("intermediate_size", VISION_TOWER + "encoder.layers.0.mlp.fc1.weight", 0),
)


def vit_section(section: Section, config_class: type, shapes: Shapes, *, class_tokens: int) -> list[str]:
    """Settle the widths of a CLIP or SigLIP tower, as :meth:`Shapes.settle` does, and its number of positions."""
    for name in {width.tensor for width in VIT_WIDTHS}:
        shapes.need(name)
    gaps = shapes.settle(section, "vision_config.", VIT_WIDTHS, config_class)
    name = VISION_TOWER + "embeddings.position_embedding.weight"
    positions, patch = shapes.need(name)[0], section["patch_size"]
    grid = math.isqrt(max(positions - class_tokens, 0))
    if grid < 1 or grid * grid + class_tokens != positions:
        raise CheckpointError(
            f"{shapes.source}: tensor '{name}' has {positions} rows; a square number plus {class_tokens} is needed. "
            "This family does not know the vision tower."
        )
    usual = default_of(config_class, "image_size")
    if "image_size" not in section and usual // patch != grid:
        section["image_size"] = grid * patch
        gaps.append(f"vision_config.image_size ('{name}' shows {grid * patch}, the default is {usual})")
    image = shapes.whole(section, "vision_config.", "image_size", usual)
    wanted = (image // patch) ** 2 + class_tokens
    shapes.check(
        name,
        (wanted, section["hidden_size"]),
        f"vision_config.image_size = {image} with patch_size = {patch}",
    )
    check_section(section, "vision_config.", shapes.source)
    return gaps


def check_vit_heads(section: Section, config_class: type, shapes: Shapes, gaps: list[str]) -> None:
    """Require a number of heads that is stated, or a default that may be trusted, and that divides the width."""
    shapes.need_stated(section, "vision_config.", ["num_attention_heads"], gaps)
    usual = default_of(config_class, "num_attention_heads")
    heads = shapes.whole(section, "vision_config.", "num_attention_heads", usual)
    if section["hidden_size"] % heads:
        raise CheckpointError(
            f"{shapes.source}: the vision tower's width, {section['hidden_size']}, is not divisible by its {heads} "
            f"heads (vision_config.num_attention_heads, default {usual}). Correct config.json."
        )
