"""Bring what an older transformers wrote into config.json to today's meaning.

``transformers_version`` says who wrote a file; without it today's meaning holds. What changed, each found by
running the releases 4.49 to 5.17 on the same weights (``tests/fixtures/world/configs``):

- yarn: before 4.51 ``original_max_position_embeddings`` and ``mscale`` were not read; from 4.51 to 4.55 the first
  replaced ``factor`` by ``max_position_embeddings`` over it; ``truncate`` is read since 4.55;
- longrope: before 5 ``original_max_position_embeddings`` was read beside ``rope_scaling``, not in it; before 4.51
  the short factors held at every length;
- ``rope_parameters``, and ``rope_theta`` in ``rope_scaling``: before 5 not read;
- ``rope_scaling`` with both ``type`` and ``rope_type``: before 5 the first held (but in Gemma-3);
- Qwen2.5-VL: before 4.53 a sliding window held in every layer, before 4.52 even with ``use_sliding_window`` false;
- Gemma-3: before 5 an image's tokens saw each other beyond a sliding window that is smaller than the image;
- ``tie_word_embeddings``: before 5 the language model's own key decided.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from safevlm.checkpoint.configs.stated_shapes import Section, default_of, shown
from safevlm.errors import CheckpointError

__all__ = ["Version", "check_image_in_window", "is_tied", "todays_text", "version_of"]

Version = tuple[int, int]
TODAY: Version = (999, 0)
LONGEST_PROMPT = 4096
"""Qwen2.5-VL's default window: an unused window of this width or more changes no prompt that is asked here."""


def version_of(raw: Mapping[str, Any]) -> Version:
    """Return major and minor number of the transformers that wrote a config, a high one when it does not say."""
    matched = re.match(r"(\d{1,4})\.(\d{1,4})(?!\d)", str(raw.get("transformers_version")))
    return (int(matched[1]), int(matched[2])) if matched else TODAY


def todays_text(section: Section, version: Version, config_class: type, source: str) -> None:
    """Change a language model's keys, in place, so that today's transformers computes what ``version`` did.

    Raises CheckpointError for a setting whose old meaning today's transformers cannot compute.
    """
    gemma = "query_pre_attn_scalar" in config_class.__dataclass_fields__  # type: ignore[attr-defined]
    _check_rotary_kinds(section, source, by_layer=gemma)
    if version < (5, 0):
        _check_newer_keys(section, version, config_class, source)
    scaling = section.get("rope_scaling")
    if isinstance(scaling, Mapping):
        if gemma and "type" in scaling and "rope_type" not in scaling:
            raise CheckpointError(
                f"{source}: config.json states rope_scaling.type = {scaling['type']!r} without rope_type; "
                "transformers 4 refuses that for Gemma-3 and 5 ignores it. Rename the key to rope_type."
            )
        if version < (5, 0):
            section["rope_scaling"] = _todays_rope(dict(scaling), section, version, config_class, gemma=gemma)
    if version < (5, 0):
        section.pop("original_max_position_embeddings", None)
    if version < (4, 53) and "use_sliding_window" in config_class.__dataclass_fields__:  # type: ignore[attr-defined]
        _todays_window(section, version, config_class)
    if gemma and version < (4, 52) and section.get("final_logit_softcapping") is not None:
        raise CheckpointError(
            f"{source}: config.json states final_logit_softcapping; for Gemma-3, transformers before 4.52 applied it "
            "and later releases ignore it. Remove the key to get the answers of later releases."
        )


def check_image_in_window(section: Section, version: Version, tokens: int, config_class: type, source: str) -> None:
    """Refuse Gemma-3's windows of before 5 that an image of ``tokens`` tokens does not fit into: today's end inside it.

    Raises CheckpointError.
    """
    stated = window = section.get("sliding_window", default_of(config_class, "sliding_window"))
    if type(window) is int and section.get("use_bidirectional_attention"):
        window = window // 2 + 1  # as the config class does
    if version < (5, 0) and type(window) is int and 0 < window < tokens:
        raise CheckpointError(
            f"{source}: config.json states sliding_window = {stated}, less than the {tokens} tokens of an image; "
            "transformers before 5 let all of them attend to each other and later releases do not. Save the "
            "checkpoint again with transformers 5 to get the answers of later releases."
        )


def _check_rotary_kinds(section: Section, source: str, *, by_layer: bool) -> None:
    """Refuse rotary settings that are no objects; Gemma-3's ``rope_parameters`` hold one for each kind of layer."""
    scaling, parameters = section.get("rope_scaling"), section.get("rope_parameters")
    for key, value in (("rope_scaling", scaling), ("rope_parameters", parameters)):
        if value is not None and not isinstance(value, Mapping):
            _refuse_rotary(source, key, value, "an object is")
    if by_layer and isinstance(parameters, Mapping):
        needed = {"full_attention"} if isinstance(scaling, Mapping) else set()
        kinds = {key for key, value in parameters.items() if isinstance(value, Mapping)}
        if not parameters.keys() <= {"full_attention", "sliding_attention"} or not needed <= kinds:
            _refuse_rotary(
                source, "rope_parameters", parameters, "an object in full_attention and sliding_attention is"
            )


def _refuse_rotary(source: str, key: str, value: object, allowed: str) -> NoReturn:
    raise CheckpointError(
        f"{source}: config.json states {key} = {shown(value)}; {allowed} allowed. "
        "Compare it with the base model's config.json."
    )


def _check_newer_keys(section: Section, version: Version, config_class: type, source: str) -> None:
    """Drop rotary keys that only transformers 5 reads where they say what the older ones say; refuse others."""
    thetas: Any = config_class.default_theta  # type: ignore[attr-defined]
    by_layer = isinstance(thetas, Mapping)  # Gemma-3
    scaling = section.get("rope_scaling")
    scaling = dict(scaling) if isinstance(scaling, Mapping) else {}
    inner = scaling.pop("rope_theta", None)
    theta = section.get("rope_theta", thetas["global"] if by_layer else thetas)
    older: dict[str, Any] = _rotary({"rope_theta": theta, **scaling})
    if by_layer:
        local = {"rope_theta": section.get("rope_local_base_freq", thetas["local"])}
        older = {"full_attention": older, "sliding_attention": _rotary(local)}
    newer = section.pop("rope_parameters", None)
    if isinstance(newer, Mapping):
        full: Mapping[str, Any] = {"rope_theta": theta} if not by_layer else {}
        stated = {key: _rotary(value) if isinstance(value, Mapping) else value for key, value in newer.items()}
        newer = stated if by_layer else _rotary({**full, **stated})
    for key, value, held in (("rope_scaling.rope_theta", inner, theta), ("rope_parameters", newer, older)):
        if value is not None and value != held:
            raise CheckpointError(
                f"{source}: config.json states {key} = {shown(value)}, which transformers {version[0]}.{version[1]} "
                f"(transformers_version) does not read; the keys that it reads give {shown(held)}. Keep the setting "
                "that the model was trained with, as rope_theta and rope_scaling."
            )
    if inner is not None:
        section["rope_scaling"] = scaling


def _rotary(stated: Mapping[str, Any]) -> dict[str, Any]:
    """Return rotary settings with their kind named, by today's key."""
    kept = {key: value for key, value in stated.items() if key not in ("type", "rope_type")}
    kind = stated.get("rope_type", stated.get("type", "default"))
    return {"rope_type": "default" if kind == "mrope" else kind, **kept}


def _todays_rope(
    scaling: dict[str, Any], section: Section, version: Version, config_class: type, *, gemma: bool
) -> dict[str, Any]:
    scaling = {key: value for key, value in scaling.items() if value is not None}
    if "type" in scaling and not gemma:
        scaling["rope_type"] = "default" if scaling["type"] == "mrope" else scaling["type"]
        del scaling["type"]
    longest = section.get("max_position_embeddings", default_of(config_class, "max_position_embeddings"))
    if scaling.get("rope_type") == "yarn":
        _todays_yarn(scaling, longest, version)
    if scaling.get("rope_type") == "longrope":
        scaling.pop("original_max_position_embeddings", None)
        outside = section.get("original_max_position_embeddings")
        if outside is not None:
            scaling |= {"original_max_position_embeddings": outside, "factor": _ratio(longest, outside)}
        if version < (4, 51):
            scaling["long_factor"] = scaling.get("short_factor")
    return scaling


def _todays_yarn(scaling: dict[str, Any], longest: Any, version: Version) -> None:
    original, factor = scaling.get("original_max_position_embeddings"), scaling.get("factor")
    if version < (4, 55):
        scaling.pop("truncate", None)
    if version < (4, 51):
        for key in ("original_max_position_embeddings", "mscale", "mscale_all_dim"):
            scaling.pop(key, None)
        if isinstance(factor, (int, float)) and factor > 0:  # another is refused with the frequencies
            scaling.setdefault("attention_factor", 0.1 * math.log(factor) + 1.0)
    elif version < (4, 56) and original is not None:
        scaling["factor"] = _ratio(longest, original)


def _ratio(longest: Any, original: Any) -> Any:
    """Divide two lengths; what is no length is handed on, and refused with the frequencies made of it."""
    numbers = type(longest) in (int, float) and type(original) in (int, float) and original > 0
    return longest / original if numbers else original


def _todays_window(section: Section, version: Version, config_class: type) -> None:
    """Put every layer behind the window where Qwen2.5-VL's mask before 4.53 did."""
    width = section.get("sliding_window", default_of(config_class, "sliding_window"))
    layers = section.get("num_hidden_layers", default_of(config_class, "num_hidden_layers"))
    used = section.get("use_sliding_window") is True
    unused_but_masked = version < (4, 52) and type(width) is int and width < LONGEST_PROMPT
    if width is not None and type(layers) is int and (used or unused_but_masked):
        section |= {"use_sliding_window": True, "layer_types": ["sliding_attention"] * layers}


def is_tied(raw: Mapping[str, Any], text: Mapping[str, Any], version: Version, classes: tuple[type, type]) -> bool:
    """Say whether input and output embedding are one, by the rule of the transformers that wrote the file.

    ``text`` are the language model's keys (``raw`` itself in flat layouts), ``classes`` those of the whole config
    and of the language model's.
    """
    whole_class, text_class = classes
    own = text.get("tie_word_embeddings", default_of(text_class, "tie_word_embeddings", False))
    if version < (5, 0):
        return own is True
    top = raw.get("tie_word_embeddings", default_of(whole_class, "tie_word_embeddings", False))
    forwarded = default_of(whole_class, "tie_word_embeddings", False) is False  # LLaVA's and Qwen's, not Gemma-3's
    return top is True or (forwarded and own is True)
