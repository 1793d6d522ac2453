"""Build transformers' config of a checkpoint from its raw ``config.json`` and the shapes of its tensors.

What is stated holds, and must agree with the tensors; what is unstated is the default of the class that the layout's
own library would use. A width that a tensor shows otherwise is read off it; a count that no tensor shows is never
guessed. Nothing of the checkpoint is executed and no language model's bytes are read, but for some rows of a second
embedding. What the layouts in the wild look like:

- original LLaVA: Llama's keys at the top level, the vision tower only as a name (``mm_vision_tower``);
- old Qwen2.5-VL: the language model's keys at the top level beside a ``vision_config``;
- transformers: ``text_config`` and ``vision_config``, each holding only what differs from a default.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    Qwen2_5_VLConfig,
    SiglipVisionConfig,
)
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import (
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLVisionConfig,
)

from safevlm.checkpoint.configs.config_checks import check_language, check_section, check_vision
from safevlm.checkpoint.configs.older_configs import check_image_in_window, version_of
from safevlm.checkpoint.configs.stated_shapes import Section, Shapes, Width, default_of, shown
from safevlm.checkpoint.configs.text_section import (
    EMBEDDING,
    check_second_embedding,
    known_keys,
    nested_section,
    text_section,
)
from safevlm.checkpoint.families.llava import NAMED_TOWERS, UNNAMED_TOWER
from safevlm.errors import CheckpointError

if TYPE_CHECKING:
    from safevlm.checkpoint.checkpoint import Checkpoint

__all__ = ["TransformersConfig", "build_config", "build_vision_config"]

TransformersConfig: TypeAlias = LlavaConfig | Qwen2_5_VLConfig | Gemma3Config

SELECTED_FEATURES: dict[str, Any] = {"patch": "default", "cls_patch": "full"}
"""Original LLaVA's words for what is kept of a layer, and transformers'; others are left to it to refuse."""
MAX_WINDOW = 16384
"""Of Qwen2.5-VL's vision tower, in pixels: the grid is padded to whole windows."""

VISION_TOWER = "model.vision_tower."
VIT_WIDTHS = (
    Width("hidden_size", VISION_TOWER + "embeddings.patch_embedding.weight", 0),
    Width("num_channels", VISION_TOWER + "embeddings.patch_embedding.weight", 1),
    Width("patch_size", VISION_TOWER + "embeddings.patch_embedding.weight", 3),
    Width("intermediate_size", VISION_TOWER + "encoder.layers.0.mlp.fc1.weight", 0),
)
QWEN_VISION_WIDTHS = (
    Width("hidden_size", "model.visual.patch_embed.proj.weight", 0),
    Width("in_channels", "model.visual.patch_embed.proj.weight", 1),
    Width("temporal_patch_size", "model.visual.patch_embed.proj.weight", 2),
    Width("patch_size", "model.visual.patch_embed.proj.weight", 4),
    Width("intermediate_size", "model.visual.blocks.0.mlp.gate_proj.weight", 0),
    Width("out_hidden_size", "model.visual.merger.mlp.2.weight", 0),
)


def build_config(checkpoint: Checkpoint) -> TransformersConfig:
    """Return transformers' own config of this checkpoint, with ``sdpa`` attention.

    A LLaVA config has ``vision_feature_layer`` counted from the first layer (hidden state ``n`` is the
    output of ``n`` layers), so that a tower stored without the layers behind it means the same.

    Errors: CheckpointError when a stated width disagrees with a tensor, a tensor that decides a width is
    missing, or a value is not one that transformers takes.
    """
    config = _build(checkpoint, Shapes(checkpoint.tensors, checkpoint.name))
    if EMBEDDING in checkpoint.tensors:
        check_language(config, checkpoint.name)
    if config.tie_word_embeddings:
        check_second_embedding(checkpoint.tensors, checkpoint.name)
    return config


def build_vision_config(checkpoint: Checkpoint) -> TransformersConfig:
    """Return the same, but of the language model only its width: the rest is one layer of width 1.

    Only shapes of the vision tower and the projector are asked for, so that shards of the language model
    are not fetched. Errors: as for ``build_config``.
    """
    return _build(checkpoint, Shapes(checkpoint.tensors, checkpoint.name, checkpoint.family.vision_prefixes))


def _build(checkpoint: Checkpoint, shapes: Shapes) -> TransformersConfig:
    raw = copy.deepcopy(dict(checkpoint.config))  # transformers changes the rotary dicts that it is given
    try:
        config = _BUILDERS[checkpoint.family.key](raw, shapes)
    except (StrictDataclassError, ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint.name}: config.json holds a value that transformers' config of "
            f"{checkpoint.family.title} does not take: {' '.join(str(error).split())[:300]}. "
            "Compare it with the base model's config.json."
        ) from error
    config._attn_implementation = "sdpa"
    check_vision(config, checkpoint.name)
    return config


def _vit_section(section: Section, config_class: type, shapes: Shapes, *, class_tokens: int) -> list[str]:
    """Settle the widths of a CLIP or SigLIP tower, as :meth:`Shapes.settle` does, and its number of positions."""
    for name in {width.tensor for width in VIT_WIDTHS}:
        shapes.need(name)
    gaps = shapes.settle(section, "vision_config.", VIT_WIDTHS, config_class)
    name = VISION_TOWER + "embeddings.position_embedding.weight"
    positions, patch = shapes.need(name)[0], section["patch_size"]
    grid = math.isqrt(max(positions - class_tokens, 0))
    if grid < 1 or grid * grid + class_tokens != positions:
        raise CheckpointError(
            f"{shapes.source}: tensor '{name}' has {positions} rows; a square grid of patches and "
            f"{class_tokens} more is needed. The vision tower is not one that this family knows."
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


def _check_vit_heads(section: Section, config_class: type, shapes: Shapes, gaps: list[str]) -> None:
    """Require a number of heads that is stated, or a default that may be trusted, and that divides the width."""
    shapes.need_stated(section, "vision_config.", ["num_attention_heads"], gaps)
    usual = default_of(config_class, "num_attention_heads")
    heads = shapes.whole(section, "vision_config.", "num_attention_heads", usual)
    if section["hidden_size"] % heads:
        raise CheckpointError(
            f"{shapes.source}: the vision tower is {section['hidden_size']} wide, which {heads} heads "
            f"(vision_config.num_attention_heads, by default {usual}) do not divide. Correct config.json."
        )


# -- families -------------------------------------------------------------------------------------------


def _llava(raw: Mapping[str, Any], shapes: Shapes) -> LlavaConfig:
    _refuse_other_parts(raw, shapes.source)
    text = text_section(raw, (LlavaConfig, LlamaConfig), shapes)
    vision = _clip_section(raw, shapes)
    _check_vit_heads(vision, CLIPVisionConfig, shapes, _vit_section(vision, CLIPVisionConfig, shapes, class_tokens=1))
    layers = _llava_feature_layers(raw, vision, shapes)
    projector = "model.multi_modal_projector.linear_1.weight"
    text.setdefault("hidden_size", shapes.need(projector)[0])
    read = vision["hidden_size"] * (1 if isinstance(layers, int) else len(layers))
    shapes.check(
        projector, (text["hidden_size"], read), "hidden_size of language model and of what is read of the tower"
    )
    select = _of_layout(raw, ("vision_feature_select_strategy", "mm_vision_select_feature"), "default", shapes.source)
    own = {key: raw[key] for key in ("projector_hidden_act", "multimodal_projector_bias") if key in raw}
    check_section(own, "", shapes.source)
    return LlavaConfig(
        text_config=LlamaConfig(**text),
        vision_config=CLIPVisionConfig(**vision),
        vision_feature_layer=layers,
        vision_feature_select_strategy=select,
        image_token_index=raw.get("image_token_index", raw.get("image_token_id", 32000)),
        image_seq_length=(vision["image_size"] // vision["patch_size"]) ** 2,
        tie_word_embeddings=text["tie_word_embeddings"],
        **own,
    )


def _of_layout(raw: Mapping[str, Any], keys: tuple[str, str], usual: Any, source: str) -> Any:
    """Return what the layout's own code reads: the first of ``keys`` is transformers', the second original LLaVA's.

    Errors: CheckpointError when the other key says otherwise.
    """
    stated = {
        key: SELECTED_FEATURES.get(raw[key], raw[key]) if isinstance(raw[key], str) else raw[key]
        for key in keys
        if key in raw
    }
    stock = raw.get("model_type") == "llava" and nested_section(raw, "text_config") is not None
    read, other = keys if stock or keys[1] not in stated else keys[::-1]
    value = stated.get(read, usual)
    if stated.get(other, value) != value:
        raise CheckpointError(
            f"{source}: config.json states {other} = {shown(raw[other])}, but this layout's code reads {read}, "
            f"which is {shown(value)}{'' if read in stated else ' by default'}. State in both what the checkpoint was "
            "trained with, or remove the wrong one."
        )
    return value


PARTS = {"text_config": "llama", "vision_config": "clip_vision_model"}
"""LLaVA's sections, and the only ``model_type`` of each that its tensors can be here."""


def _refuse_other_parts(raw: Mapping[str, Any], source: str) -> None:
    wanted = {"mm_projector_type": "mlp2x_gelu", "mm_patch_merge_type": "flat"}
    found = [(key, raw[key], kind) for key, kind in wanted.items() if raw.get(key, kind) != kind]
    for part, kind in PARTS.items():
        stated = (nested_section(raw, part) or {}).get("model_type", kind)
        found += [(f"{part}.model_type", stated, kind)] if stated != kind else []
    for key, stated, kind in found:
        raise CheckpointError(
            f"{source}: config.json states {key} = {shown(stated)}; LLaVA-1.5's '{kind}' is the only one known "
            "here. Use a checkpoint of LLaVA-1.5's architecture."
        )


def _clip_section(raw: Mapping[str, Any], shapes: Shapes) -> Section:
    """Return the vision tower's keys: stated, those of the tower that is named, or LLaVA's default tower.

    Errors: CheckpointError for a tower that is only named, by a name that is not known.
    """
    nested = nested_section(raw, "vision_config")
    if nested is not None:
        return known_keys(nested, CLIPVisionConfig)
    stated = raw.get("mm_vision_tower")
    if stated is None:
        return dict(UNNAMED_TOWER)
    name = str(stated).rstrip("/").rsplit("/", 1)[-1]
    if name not in NAMED_TOWERS:
        raise CheckpointError(
            f"{shapes.source}: config.json names the vision tower {shown(stated)} and has no vision_config; no tensor "
            f"shows how many heads a tower has. Known by name: {', '.join(NAMED_TOWERS)}. For another one, add its "
            "own config as vision_config."
        )
    return dict(NAMED_TOWERS[name])


def _llava_feature_layers(raw: Mapping[str, Any], vision: Section, shapes: Shapes) -> int | list[int]:
    """Return the hidden states that the projector reads, and set ``num_hidden_layers`` to what is stored.

    Several are concatenated, in their order.
    """
    stored = shapes.count(VISION_TOWER + "encoder.layers.")
    usual = default_of(CLIPVisionConfig, "num_hidden_layers")
    stated = shapes.whole(vision, "vision_config.", "num_hidden_layers", usual)
    given = _of_layout(raw, ("vision_feature_layer", "mm_vision_select_layer"), -2, shapes.source)
    layers = given if isinstance(given, list) else [given]
    if not layers or not all(type(layer) is int and -stated - 1 <= layer <= stated for layer in layers):
        raise CheckpointError(
            f"{shapes.source}: config.json asks for layer {shown(given)} of a vision tower with {stated} layers; "
            f"a whole number from {-stated - 1} to {stated}, or a list of them, is allowed (LLaVA-1.5: -2)."
        )
    read = [layer if layer >= 0 else stated + 1 + layer for layer in layers]
    needed = max(read)
    if stored < needed or stored > stated:
        raise CheckpointError(
            f"{shapes.source}: the files hold {stored} vision layers '{VISION_TOWER}encoder.layers.*', "
            f"config.json asks for the output of {needed} of {stated}. Fetch config and tensors from the "
            "same revision."
        )
    vision["num_hidden_layers"] = stored
    return read if isinstance(given, list) else needed


def _gemma3(raw: Mapping[str, Any], shapes: Shapes) -> Gemma3Config:
    text = text_section(raw, (Gemma3Config, Gemma3TextConfig), shapes)
    vision = known_keys(nested_section(raw, "vision_config") or {}, SiglipVisionConfig)
    gaps = _vit_section(vision, SiglipVisionConfig, shapes, class_tokens=0)
    layers = VISION_TOWER + "encoder.layers."
    gaps += shapes.layers(vision, "vision_config.", "num_hidden_layers", layers, SiglipVisionConfig)
    _check_vit_heads(vision, SiglipVisionConfig, shapes, gaps)
    projector = "model.multi_modal_projector.mm_input_projection_weight"
    text.setdefault("hidden_size", shapes.need(projector)[1])
    shapes.check(projector, (vision["hidden_size"], text["hidden_size"]), "hidden_size of tower and language model")
    tokens = shapes.whole(dict(raw), "", "mm_tokens_per_image", default_of(Gemma3Config, "mm_tokens_per_image"))
    side, grid = math.isqrt(tokens), vision["image_size"] // vision["patch_size"]
    if side * side != tokens or grid % side:
        raise CheckpointError(
            f"{shapes.source}: config.json states mm_tokens_per_image = {tokens}; a square whose side "
            f"divides the {grid}x{grid} grid of patches is needed."
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


def _qwen2_5_vl(raw: Mapping[str, Any], shapes: Shapes) -> Qwen2_5_VLConfig:
    text = text_section(raw, (Qwen2_5_VLConfig, Qwen2_5_VLTextConfig), shapes)
    vision = _qwen_vision_section(raw, shapes)
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


def _qwen_vision_section(raw: Mapping[str, Any], shapes: Shapes) -> Section:
    where, own_class = "vision_config.", Qwen2_5_VLVisionConfig
    vision = known_keys(nested_section(raw, "vision_config") or {}, own_class)
    gaps = shapes.settle(vision, where, QWEN_VISION_WIDTHS, own_class)
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


_BUILDERS: dict[str, Callable[[Mapping[str, Any], Shapes], TransformersConfig]] = {
    "llava": _llava,
    "qwen2_5_vl": _qwen2_5_vl,
    "gemma3": _gemma3,
}
