"""Build transformers' config of a checkpoint from its raw ``config.json`` and the shapes of its tensors.

A stated width must agree with the tensors; a width that is not stated is read off them. Nothing of the
checkpoint is executed and no tensor's bytes are read. What the layouts in the wild look like:

- original LLaVA: Llama's keys at the top level, the vision tower only as a name (``mm_vision_tower``);
- old Qwen2.5-VL: the language model's keys at the top level beside a ``vision_config``;
- transformers: ``text_config`` and ``vision_config``, each holding only what differs from a default.
"""

from __future__ import annotations

import copy
import inspect
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
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import (
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLVisionConfig,
)

from models.errors import CheckpointError
from models.stated_shapes import Section, Shapes, Width

if TYPE_CHECKING:
    from models.checkpoint import Checkpoint

__all__ = ["TransformersConfig", "build_config", "build_vision_config"]

TransformersConfig: TypeAlias = LlavaConfig | Qwen2_5_VLConfig | Gemma3Config

CLIP_HEAD_DIM = 64
"""Of every OpenAI CLIP vision tower."""
LLAMA_HEAD_DIM = 128
"""Of Llama-2, Vicuna and Qwen2.5: assumed only where neither head count nor head width is stated."""
KNOWN_TOWER_LAYERS = {"clip-vit-large-patch14-336": 24, "clip-vit-large-patch14": 24}
"""Layers of the towers that original LLaVA configs only name; a negative layer counts from the last."""
SELECTED_FEATURES: dict[str, Any] = {"patch": "default", "cls_patch": "full"}
"""Original LLaVA's words for what is kept of a layer, and transformers'; others are left to it to refuse."""
ROPE_KEYS = (
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "rope_local_base_freq",
    "sliding_window_pattern",
)
"""Rotary keys of all ages: transformers' config classes take them, though their signatures do not say so."""

VISION_TOWER = "model.vision_tower."
EMBEDDING = "model.language_model.embed_tokens.weight"
FIRST_LAYER = "model.language_model.layers.0."


STAND_IN: Section = {
    "vocab_size": 1,
    "intermediate_size": 1,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": True,
}
"""A language model to lay out and drop where none is read; its width is the projector's."""
TEXT_WIDTHS = (
    Width("vocab_size", EMBEDDING, 0),
    Width("hidden_size", EMBEDDING, 1),
    Width("intermediate_size", FIRST_LAYER + "mlp.gate_proj.weight", 0),
)
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
    _check_rope(config, checkpoint.name)
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
    except (StrictDataclassError, TypeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{checkpoint.name}: config.json holds a value that transformers' config of "
            f"{checkpoint.family.title} does not take: {error}. Compare it with the base model's config.json."
        ) from error
    config._attn_implementation = "sdpa"
    return config


def _check_rope(config: TransformersConfig, source: str) -> None:
    """Refuse a rotary embedding that transformers does not have; its configs only warn of one."""
    text: Any = config.text_config
    rope = text.rope_parameters
    for section in (rope, *(value for value in rope.values() if isinstance(value, Mapping))):
        kind = section.get("rope_type", "default")
        if kind not in ("default", *ROPE_INIT_FUNCTIONS):
            raise CheckpointError(
                f"{source}: config.json states the rotary embedding '{kind}'; transformers has 'default', "
                f"{', '.join(repr(name) for name in sorted(ROPE_INIT_FUNCTIONS))}. Correct rope_scaling."
            )


# -- sections -------------------------------------------------------------------------------------------


def _known(raw: Mapping[str, Any], config_class: type) -> Section:
    """Keep the keys of ``raw`` that a config class takes, without ``None`` and the stored number format."""
    allowed = {*inspect.signature(config_class).parameters, *ROPE_KEYS} - {"dtype", "torch_dtype"}
    return {key: value for key, value in raw.items() if key in allowed and value is not None}


def _text_section(raw: Mapping[str, Any], config_class: type, shapes: Shapes, head_dim: int) -> Section:
    """Return the language model's keys, from ``text_config`` or, in flat layouts, from the top level.

    ``head_dim`` is used where neither the number of heads nor their width is stated. Without the language
    model's tensors its width is the only key that says anything.
    """
    nested = raw.get("text_config")
    where = "text_config." if isinstance(nested, Mapping) else ""
    section = _known(nested if isinstance(nested, Mapping) else raw, config_class)
    if EMBEDDING not in shapes:
        return STAND_IN | {key: section[key] for key in ("hidden_size",) if key in section}
    shapes.settle(section, where, TEXT_WIDTHS)
    shapes.layers(section, where, "num_hidden_layers", "model.language_model.layers.")
    _settle_heads(section, where, shapes, head_dim)
    _settle_tying(section, raw, shapes)
    pad = section.get("pad_token_id")
    if isinstance(pad, int) and not 0 <= pad < section.get("vocab_size", pad + 1):
        section["pad_token_id"] = None  # LLaVA's -1 or 32001: no row of the embedding
    return section


def _settle_heads(section: Section, where: str, shapes: Shapes, head_dim: int) -> None:
    q_name, k_name = FIRST_LAYER + "self_attn.q_proj.weight", FIRST_LAYER + "self_attn.k_proj.weight"
    norm_name = FIRST_LAYER + "self_attn.q_norm.weight"
    q_norm, q_shape, k_shape = (shapes.get(n) for n in (norm_name, q_name, k_name))
    if q_shape is None or k_shape is None:
        return
    if q_norm is not None:  # Gemma-3 stores the width of a head
        shapes.agree(section, where, "head_dim", q_norm[0], norm_name, 0)
    if "head_dim" in section:
        head_dim = shapes.whole(section, where, "head_dim", head_dim)
    elif "num_attention_heads" in section:
        head_dim = max(1, q_shape[0] // shapes.whole(section, where, "num_attention_heads", 1))
    heads = shapes.whole(section, where, "num_attention_heads", q_shape[0] // head_dim)
    groups = shapes.whole(section, where, "num_key_value_heads", k_shape[0] // head_dim)
    reason = f"{where}num_attention_heads = {heads}, num_key_value_heads = {groups} of width {head_dim}"
    shapes.check(q_name, (heads * head_dim, q_shape[1]), reason)
    shapes.check(k_name, (groups * head_dim, k_shape[1]), reason)


def _settle_tying(section: Section, raw: Mapping[str, Any], shapes: Shapes) -> None:
    """Tie input and output embedding exactly when no output embedding is stored."""
    stored = "lm_head.weight" in shapes
    if stored:
        shapes.check("lm_head.weight", shapes.need(EMBEDDING), f"the shape of '{EMBEDDING}'")
    stated = raw.get("tie_word_embeddings", section.get("tie_word_embeddings"))
    if not stored and stated is False:
        raise CheckpointError(
            f"{shapes.source}: tensor 'lm_head.weight' is missing while config.json states "
            "tie_word_embeddings = false. The checkpoint is incomplete: fetch it again."
        )
    section["tie_word_embeddings"] = not stored


def _vit_section(section: Section, shapes: Shapes, *, extra_positions: int) -> Section:
    """Settle a CLIP or SigLIP tower: ``extra_positions`` is 1 where a class token has a position."""
    for name in {width.tensor for width in VIT_WIDTHS}:
        shapes.need(name)
    shapes.settle(section, "vision_config.", VIT_WIDTHS)
    name = VISION_TOWER + "embeddings.position_embedding.weight"
    positions = shapes.need(name)[0]
    grid = math.isqrt(max(positions - extra_positions, 0))
    if grid < 1 or grid * grid + extra_positions != positions:
        raise CheckpointError(
            f"{shapes.source}: tensor '{name}' has {positions} rows; a square grid of patches and "
            f"{extra_positions} more is needed. The vision tower is not one that this family knows."
        )
    image = shapes.whole(section, "vision_config.", "image_size", grid * section["patch_size"])
    wanted = (image // section["patch_size"]) ** 2 + extra_positions
    shapes.check(
        name,
        (wanted, section["hidden_size"]),
        f"vision_config.image_size = {image} with patch_size = {section['patch_size']}",
    )
    return section


# -- families -------------------------------------------------------------------------------------------


def _llava(raw: Mapping[str, Any], shapes: Shapes) -> LlavaConfig:
    text = _text_section(raw, LlamaConfig, shapes, LLAMA_HEAD_DIM)
    _refuse_unknown_projector(raw)
    nested = raw.get("vision_config")
    vision = _known(nested, CLIPVisionConfig) if isinstance(nested, Mapping) else {}
    _vit_section(vision, shapes, extra_positions=1)
    vision.setdefault("num_attention_heads", vision["hidden_size"] // CLIP_HEAD_DIM)
    layer = _llava_feature_layer(raw, vision, shapes)
    projector = "model.multi_modal_projector.linear_1.weight"
    text.setdefault("hidden_size", shapes.need(projector)[0])
    shapes.check(projector, (text["hidden_size"], vision["hidden_size"]), "hidden_size of language model and tower")
    select = raw.get("vision_feature_select_strategy") or raw.get("mm_vision_select_feature") or "default"
    return LlavaConfig(
        text_config=LlamaConfig(**text),
        vision_config=CLIPVisionConfig(**vision),
        vision_feature_layer=layer,
        vision_feature_select_strategy=SELECTED_FEATURES.get(select, select),
        projector_hidden_act=raw.get("projector_hidden_act", "gelu"),
        multimodal_projector_bias="model.multi_modal_projector.linear_1.bias" in shapes,
        image_token_index=raw.get("image_token_index", raw.get("image_token_id", 32000)),
        image_seq_length=(vision["image_size"] // vision["patch_size"]) ** 2,
        tie_word_embeddings=text["tie_word_embeddings"],
    )


def _refuse_unknown_projector(raw: Mapping[str, Any]) -> None:
    kind = raw.get("mm_projector_type", "mlp2x_gelu")
    if kind != "mlp2x_gelu":
        raise CheckpointError(
            f"config.json states mm_projector_type = '{kind}'; LLaVA-1.5's 'mlp2x_gelu' is the only "
            "projector known here. Use a checkpoint of LLaVA-1.5's architecture."
        )


def _llava_feature_layer(raw: Mapping[str, Any], vision: Section, shapes: Shapes) -> int:
    """Return the hidden state that the projector reads, and set ``num_hidden_layers`` to what is stored."""
    stored = shapes.count(VISION_TOWER + "encoder.layers.")
    tower = str(raw.get("mm_vision_tower") or "").rstrip("/").rsplit("/", 1)[-1]
    stated = int(vision.get("num_hidden_layers") or KNOWN_TOWER_LAYERS.get(tower, stored))
    layer = raw.get("vision_feature_layer", raw.get("mm_vision_select_layer", -2))
    if not isinstance(layer, int) or isinstance(layer, bool) or not -stated - 1 <= layer <= stated:
        raise CheckpointError(
            f"{shapes.source}: config.json asks for layer {layer!r} of a vision tower of {stated} layers; "
            f"one whole number from {-stated - 1} to {stated} is allowed (LLaVA-1.5: -2)."
        )
    needed = layer if layer >= 0 else stated + 1 + layer
    if stored < needed or stored > stated:
        raise CheckpointError(
            f"{shapes.source}: the files hold {stored} vision layers '{VISION_TOWER}encoder.layers.*', "
            f"config.json asks for the output of {needed} of {stated}. Fetch config and tensors from the "
            "same revision."
        )
    vision["num_hidden_layers"] = stored
    return needed


def _gemma3(raw: Mapping[str, Any], shapes: Shapes) -> Gemma3Config:
    text = _text_section(raw, Gemma3TextConfig, shapes, 256)
    nested = raw.get("vision_config")
    vision = _known(nested, SiglipVisionConfig) if isinstance(nested, Mapping) else {}
    _vit_section(vision, shapes, extra_positions=0)
    vision.setdefault("num_attention_heads", 16)  # SigLIP so400m, the only tower Gemma-3 was trained with
    shapes.layers(vision, "vision_config.", "num_hidden_layers", VISION_TOWER + "encoder.layers.")
    projector = "model.multi_modal_projector.mm_input_projection_weight"
    text.setdefault("hidden_size", shapes.need(projector)[1])
    shapes.check(projector, (vision["hidden_size"], text["hidden_size"]), "hidden_size of tower and language model")
    tokens = shapes.whole(dict(raw), "", "mm_tokens_per_image", 256)
    side, grid = math.isqrt(tokens), vision["image_size"] // vision["patch_size"]
    if side * side != tokens or grid % side:
        raise CheckpointError(
            f"{shapes.source}: config.json states mm_tokens_per_image = {tokens}; a square whose side "
            f"divides the {grid}x{grid} grid of patches is needed."
        )
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
    text = _text_section(raw, Qwen2_5_VLTextConfig, shapes, LLAMA_HEAD_DIM)
    nested = dict(raw.get("vision_config") or {})
    if "in_chans" in nested:
        nested.setdefault("in_channels", nested["in_chans"])
    vision = _known(nested, Qwen2_5_VLVisionConfig)
    shapes.settle(vision, "vision_config.", QWEN_VISION_WIDTHS)
    shapes.layers(vision, "vision_config.", "depth", "model.visual.blocks.")
    merger = "model.visual.merger.mlp.0.weight"
    unit = shapes.need(merger)[0] // vision["hidden_size"]
    merge = shapes.whole(vision, "vision_config.", "spatial_merge_size", math.isqrt(unit))
    merged = vision["hidden_size"] * merge**2
    shapes.check(merger, (merged, merged), f"vision_config.spatial_merge_size = {merge}")
    text.setdefault("hidden_size", vision["out_hidden_size"])
    projector = "model.visual.merger.mlp.2.weight"
    shapes.check(projector, (text["hidden_size"], merged), "hidden_size of the language model")
    indices = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return Qwen2_5_VLConfig(
        text_config=Qwen2_5_VLTextConfig(**text),
        vision_config=Qwen2_5_VLVisionConfig(**vision),
        tie_word_embeddings=text["tie_word_embeddings"],
        **{key: raw[key] for key in indices if raw.get(key) is not None},
    )


_BUILDERS: dict[str, Callable[[Mapping[str, Any], Shapes], TransformersConfig]] = {
    "llava": _llava,
    "qwen2_5_vl": _qwen2_5_vl,
    "gemma3": _gemma3,
}
