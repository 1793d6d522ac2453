"""Which file of a checkpoint says what of its images, in the order of the family's own code.

=============================  ================================================================================
setting                        where it is looked up
=============================  ================================================================================
the image processor's          ``image_processor`` of ``processor_config.json``, otherwise ``preprocessor_config.json``,
                               whole; otherwise the family's (transformers and LLaVA: the base model's)
a key that file leaves out     the default of its class
(:data:`safevlm.checkpoint.configs.processor_config.CLASS_DEFAULTS`) ``image_processor_type``       that file, its
``feature_extractor_type``, ``config.json``, the class of the model type ``image_aspect_ratio``         ``config.json``,
for checkpoints of LLaVA's original code; transformers reads it nowhere ``mm_use_im_start_end``,       ``config.json``,
likewise: refused where they change the image or the prompt ``s2``, ``mm_resampler_type``
``mm_vision_select_layer``,    ``config.json`` (:mod:`safevlm.checkpoint.configs.transformers_config`)
``mm_vision_select_feature``,
``mm_projector_type``
``patch_size``,                ``config.json``; ``processor_config.json`` only counts placeholders by them, and one
``image_seq_length``,          that differs is refused
``vision_feature_select_…``
``min_pixels``,                the image processor's file, over ``size`` (Qwen2.5-VL)
``max_pixels``
``do_pan_and_scan``            the image processor's file; refused when on (Gemma-3)
``eos_token_id``               ``generation_config.json``, otherwise ``config.json``; with the tokenizer's and the
                               family's end of turn (:mod:`safevlm.network.prompt_tokens`)
``do_sample``, ``temperature`` read nowhere: answers are decoded greedily by every runtime, and records say so
and other sampling
``chat_template``              read nowhere: the prompt is the family's (:class:`safevlm.network.dialogue.ChatFormat`)
=============================  ================================================================================

Sources: ``image_processing_base.get_image_processor_dict`` and ``AutoImageProcessor`` of transformers 5.17;
``process_images`` in LLaVA's ``mm_utils.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safevlm.checkpoint.family import Family
from safevlm.errors import CheckpointError
from safevlm.files.json_file import read_json_object

__all__ = ["read_processor_settings"]

PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
RATIO = "image_aspect_ratio"
COUNTS = (
    ("vision_feature_select_strategy", ("vision_feature_select_strategy",)),
    ("patch_size", ("vision_config", "patch_size")),
    ("image_seq_length", ("mm_tokens_per_image",)),
)
"""What ``processor_config.json`` counts an image's placeholders by, and where ``config.json`` states the same."""


def read_processor_settings(folder: Path, family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the image processor's settings as ``read_processor`` takes them.

    Raises CheckpointError for a file that is not usable, and for
    settings that contradict each other or that are not followed here.
    """
    _check_own_settings(folder, family, config)
    name, own = _own_file(folder, config)
    if own is None:
        settings = dict(family.preprocessing)
    else:
        settings = dict(own)
        if not (settings.get("image_processor_type") or settings.get("feature_extractor_type")):
            stock = config.get("model_type") == family.auto_model_type
            usual = family.auto_processor if stock else family.preprocessing["image_processor_type"]
            settings["image_processor_type"] = config.get("image_processor_type") or usual
    return _with_aspect_ratio(folder, name, settings, family, config)


def _own_file(folder: Path, config: Mapping[str, Any]) -> tuple[str, dict[str, Any] | None]:
    """Return the file that states the image processor, and what it states; ``None`` when no file does."""
    if (folder / PROCESSOR).is_file():
        whole = read_json_object(folder / PROCESSOR, needed_for="the processor's settings")
        _check_counts(folder, whole, config)
        nested = whole.get("image_processor")
        if isinstance(nested, dict):
            return PROCESSOR, nested
        if nested is not None:
            raise CheckpointError(
                f"{folder / PROCESSOR}: 'image_processor' is {nested!r}, an object is allowed. Fetch the file again."
            )
    if (folder / PREPROCESSOR).is_file():
        return PREPROCESSOR, read_json_object(folder / PREPROCESSOR, needed_for="the image processor's settings")
    return PREPROCESSOR, None


def _check_counts(folder: Path, processor: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Refuse a processor that counts other image tokens than the model makes: transformers fails on its first image."""
    for key, path in COUNTS:
        stated: Any = config
        for level in path:
            stated = stated.get(level) if isinstance(stated, Mapping) else None
        if None not in (stated, processor.get(key)) and processor[key] != stated:
            raise CheckpointError(
                f"{folder / PROCESSOR}: {key} = {processor[key]!r}, but config.json states {'.'.join(path)} = "
                f"{stated!r}. Both count an image's tokens and must agree: fetch both files from the same revision."
            )


def _is_original(family: Family, config: Mapping[str, Any]) -> bool:
    """Say whether a config is read by the family's original code: its own keys or a model type of its own."""
    return config.get("model_type") != family.auto_model_type or any(key.startswith("mm_") for key in config)


def _check_own_settings(folder: Path, family: Family, config: Mapping[str, Any]) -> None:
    where = folder / "config.json"
    for setting in family.own_settings:
        value = config.get(setting.key)
        if value not in setting.followed:
            allowed = ", ".join(repr(item) for item in setting.followed if item is not None)
            raise CheckpointError(
                f"{where}: {setting.key} = {value!r}, which {setting.effect}; that is not supported. Allowed: "
                f"{allowed}, or leave the key out. Use a checkpoint of {family.title}'s own architecture."
            )
        for section in ("text_config", "vision_config"):
            nested = config.get(section)
            inner = nested.get(setting.key) if isinstance(nested, Mapping) else None
            if inner is not None and inner != value:
                raise CheckpointError(
                    f"{where}: {section} states {setting.key} = {inner!r}, but only the top level is read, where it is "
                    f"{value!r}. Move the key there, or remove it."
                )


def _with_aspect_ratio(
    folder: Path, name: str, settings: dict[str, Any], family: Family, config: Mapping[str, Any]
) -> dict[str, Any]:
    """Add LLaVA's ``image_aspect_ratio``; it is pad or not whichever file says so, or refused."""
    beside = settings.pop(RATIO, None)
    own = any(setting.key == RATIO for setting in family.own_settings)
    stated = config.get(RATIO) if own else None
    kind = str(settings.get("image_processor_type", ""))
    padded = kind.startswith("LlavaImageProcessor") and bool(settings.get("do_pad"))
    if beside is not None and (beside == "pad") != (stated == "pad"):
        raise CheckpointError(
            f"{folder / name}: {RATIO} = {beside!r}, but it is read from config.json, which states {stated!r}. "
            + (f"State the same in config.json, or remove it from {name}." if own else f"Remove it from {name}.")
        )
    if stated is None or (stated == "pad") == padded:
        return settings
    if stated == "pad" and _is_original(family, config):
        return {**settings, RATIO: stated}
    raise CheckpointError(
        f"{folder / 'config.json'}: {RATIO} = {stated!r}, but the {kind} of {name} has do_pad = "
        f"{settings.get('do_pad', False)!r}: they contradict each other about wide images. Correct the one that "
        "the checkpoint was not trained with; transformers reads do_pad only in a LlavaImageProcessor."
    )
