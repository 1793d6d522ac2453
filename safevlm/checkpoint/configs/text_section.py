"""The language model's section of a config: its keys, wherever a layout keeps them, settled by its tensors."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from safevlm.checkpoint.configs.config_checks import check_section
from safevlm.checkpoint.configs.older_configs import is_tied, todays_text, version_of
from safevlm.checkpoint.configs.stated_shapes import Section, Shapes, Width, default_of, shown
from safevlm.errors import CheckpointError

if TYPE_CHECKING:
    from safevlm.checkpoint.weights.tensors import TensorStore

__all__ = ["EMBEDDING", "check_second_embedding", "known_keys", "nested_section", "text_section"]

ROPE_KEYS = (
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "rope_local_base_freq",
    "sliding_window_pattern",
    "partial_rotary_factor",
    "original_max_position_embeddings",
)
"""Rotary keys of all ages: transformers' config classes take them, though their signatures do not say so."""
NOT_OF_THE_MODEL = ("dtype", "torch_dtype", "return_dict", "output_hidden_states", "transformers_version")
COMPARED_ROWS = 64
EMBEDDING = "model.language_model.embed_tokens.weight"
OUTPUT = "lm_head.weight"
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
HEAD_WIDTH = Width("head_dim", FIRST_LAYER + "self_attn.q_norm.weight", 0)


def nested_section(raw: Mapping[str, Any], key: str) -> dict[str, Any] | None:
    """Return a section of the config, ``None`` where there is none. Raises CheckpointError when it is no object."""
    section = raw.get(key)
    if section is not None and not isinstance(section, Mapping):
        raise CheckpointError(
            f"config.json states {key} = {shown(section)}; an object is allowed. Fetch config.json again."
        )
    return None if section is None else dict(section)


def known_keys(raw: Mapping[str, Any], config_class: type) -> Section:
    """Keep the keys of ``raw`` that a config class takes, without the stored number format."""
    allowed = {*inspect.signature(config_class).parameters, *ROPE_KEYS}.difference(NOT_OF_THE_MODEL)
    return {key: value for key, value in raw.items() if key in allowed}


def text_section(
    raw: Mapping[str, Any],
    classes: tuple[type, type],
    shapes: Shapes,
    *,
    shows_heads: bool = False,
    whole: tuple[str, ...] = (),
) -> Section:
    """Return the language model's keys, from ``text_config`` or, in flat layouts, from the top level.

    ``classes`` are those of the whole config and of the language model's. With ``shows_heads`` a layer has ``q_norm``,
    which shows the width of a head, and so their number; ``whole`` are keys that must be whole numbers. Without the
    language model's tensors its width is the only key that says anything.
    """
    nested, config_class = nested_section(raw, "text_config"), classes[1]
    where, stated = ("", raw) if nested is None else ("text_config.", nested)
    section = known_keys(stated, config_class)
    if EMBEDDING not in shapes:
        return STAND_IN | {key: section[key] for key in ("hidden_size",) if key in section}
    widths = (*TEXT_WIDTHS, HEAD_WIDTH) if shows_heads else TEXT_WIDTHS
    gaps = shapes.settle(section, where, widths, config_class)
    gaps += shapes.layers(section, where, "num_hidden_layers", "model.language_model.layers.", config_class)
    for key in whole:
        shapes.whole(section, where, key, default_of(config_class, key))
    if not shows_heads:
        shapes.need_stated(section, where, ["num_attention_heads"], gaps)
    _settle_heads(section, where, config_class, shapes)
    todays_text(section, version_of(raw), config_class, shapes.source)
    check_section(section, where, shapes.source)
    section["tie_word_embeddings"] = _tying(raw, stated, classes, shapes)
    pad = section.get("pad_token_id")
    if isinstance(pad, int) and not 0 <= pad < section["vocab_size"]:
        section["pad_token_id"] = None  # LLaVA's -1 or 32001: no row of the embedding
    return section


def _settle_heads(section: Section, where: str, config_class: type, shapes: Shapes) -> None:
    """Check heads against the first layer; key and value heads that are left out are read off it."""
    q_name, k_name = FIRST_LAYER + "self_attn.q_proj.weight", FIRST_LAYER + "self_attn.k_proj.weight"
    q_shape, k_shape = shapes.get(q_name), shapes.get(k_name)
    if q_shape is None or k_shape is None:
        return
    stated = dict(section)  # only what is stated is checked: a default of transformers is whole
    heads = shapes.whole(stated, where, "num_attention_heads", default_of(config_class, "num_attention_heads"))
    if stated.get("head_dim") is None:
        stated["head_dim"] = max(1, section["hidden_size"] // heads)
    head_dim = shapes.whole(stated, where, "head_dim", 1)
    if stated.get("num_key_value_heads", 0) is None:
        stated["num_key_value_heads"] = heads
    usual = default_of(config_class, "num_key_value_heads") or heads
    if "num_key_value_heads" not in section and k_shape[0] != usual * head_dim:
        section["num_key_value_heads"] = usual = max(1, k_shape[0] // head_dim)
    groups = shapes.whole(stated, where, "num_key_value_heads", usual)
    reason = f"{where}num_attention_heads = {heads}, num_key_value_heads = {groups} of width {head_dim}"
    shapes.check(q_name, (heads * head_dim, q_shape[1]), reason)
    shapes.check(k_name, (groups * head_dim, k_shape[1]), reason)


def _tying(raw: Mapping[str, Any], text: Mapping[str, Any], classes: tuple[type, type], shapes: Shapes) -> bool:
    """Say whether the output embedding is the input embedding.

    Where both are stored and the config ties them, transformers since 5 computes with both, and before 5 with one
    (see :func:`check_second_embedding`).
    """
    version, stored = version_of(raw), OUTPUT in shapes
    for keys in (raw, text):
        value = keys.get("tie_word_embeddings", False)
        if not isinstance(value, bool):
            raise CheckpointError(
                f"{shapes.source}: config.json states tie_word_embeddings = {shown(value)}; true or false is allowed. "
                "Compare it with the base model's config.json."
            )
    tied = is_tied(raw, text, version, classes)
    if stored:
        shapes.check(OUTPUT, shapes.need(EMBEDDING), f"the shape of '{EMBEDDING}'")
        return tied and version < (5, 0)
    if not tied:
        raise CheckpointError(
            f"{shapes.source}: tensor '{OUTPUT}' is missing while config.json states "
            "tie_word_embeddings = false, or leaves it to that default. The checkpoint is incomplete: fetch it again."
        )
    return True


def check_second_embedding(tensors: TensorStore, source: str) -> None:
    """Refuse an output embedding of its own in a model that ties it: transformers before 5 leaves it out.

    Raises CheckpointError.
    """
    if OUTPUT not in tensors or EMBEDDING not in tensors:
        return
    embedding, output = tensors.read(EMBEDDING), tensors.read(OUTPUT)
    rows = torch.linspace(0, len(embedding) - 1, COMPARED_ROWS).long()
    if not torch.equal(embedding[rows], output[rows]):
        raise CheckpointError(
            f"{source}: '{OUTPUT}' differs from '{EMBEDDING}', but by config.json's tie_word_embeddings and "
            "transformers_version they are the same tensor. Set tie_word_embeddings = false in text_config to use "
            f"'{OUTPUT}', or remove that tensor."
        )
