"""LLaVA-1.5 in transformers: ``LlavaModel`` with a CLIP tower and Llama, and its config from every layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from safevlm.checkpoint.architectures.architecture import Architecture
from safevlm.checkpoint.configs.config_checks import check_section
from safevlm.checkpoint.configs.stated_shapes import Section, Shapes, default_of, shown
from safevlm.checkpoint.configs.text_section import known_keys, nested_section, text_section
from safevlm.checkpoint.configs.vit_section import VISION_TOWER, check_vit_heads, vit_section
from safevlm.checkpoint.families.llava import NAMED_TOWERS, UNNAMED_TOWER
from safevlm.errors import CheckpointError
from safevlm.network.geometry import SquareGeometry

__all__ = ["LLAVA"]

SELECTED_FEATURES: dict[str, Any] = {"patch": "default", "cls_patch": "full"}
"""Original LLaVA's names for the tokens kept of a layer, with transformers' names. transformers refuses others."""


def _config(raw: Mapping[str, Any], shapes: Shapes) -> LlavaConfig:
    _refuse_other_parts(raw, shapes.source)
    text = text_section(raw, (LlavaConfig, LlamaConfig), shapes)
    vision = _clip_section(raw, shapes)
    check_vit_heads(vision, CLIPVisionConfig, shapes, vit_section(vision, CLIPVisionConfig, shapes, class_tokens=1))
    layers = _feature_layers(raw, vision, shapes)
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

    Raises CheckpointError when the other key says otherwise.
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
            f"{source}: config.json states {other} = {shown(raw[other])}, but this layout's code reads {read}, which "
            f"is {shown(value)}{'' if read in stated else ' by default'}. Give both the value that the checkpoint was "
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
            f"{source}: config.json states {key} = {shown(stated)}; only LLaVA-1.5's '{kind}' is supported. Use a "
            "checkpoint of LLaVA-1.5's architecture."
        )


def _clip_section(raw: Mapping[str, Any], shapes: Shapes) -> Section:
    """Return the vision tower's keys: stated, those of the tower that is named, or LLaVA's default tower.

    Raises CheckpointError for a tower that is only named, by a name that is not known.
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
            f"{shapes.source}: config.json names the unknown vision tower {shown(stated)} and has no vision_config. "
            f"Known towers: {', '.join(NAMED_TOWERS)}. For another one, add its own config as vision_config."
        )
    return dict(NAMED_TOWERS[name])


def _feature_layers(raw: Mapping[str, Any], vision: Section, shapes: Shapes) -> int | list[int]:
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
            f"{shapes.source}: config.json asks for layer {shown(given)} of a vision tower with {stated} layers. "
            f"Allowed: a whole number from {-stated - 1} to {stated}, or a list of them (LLaVA-1.5: -2)."
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


def _geometry(config: Any) -> SquareGeometry:
    vision = config.vision_config
    class_token = int(config.vision_feature_select_strategy == "full")
    return SquareGeometry(vision.image_size, (vision.image_size // vision.patch_size) ** 2 + class_token)


def _placeholders(config: Any) -> dict[str, Any]:
    return {
        "patch_size": config.vision_config.patch_size,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "num_additional_image_tokens": 1,  # CLIP's class token, taken away again where it is not read
    }


LLAVA = Architecture(
    config_class=LlavaConfig,
    build_config=_config,
    inner_class=LlavaModel,
    whole_class=LlavaForConditionalGeneration,
    rotary_class=LlamaRotaryEmbedding,
    unread=("vision_tower.post_layernorm",),  # only CLIP's pooled output reads it
    processor_class="LlavaProcessor",
    placeholders=_placeholders,
    geometry=_geometry,
)
