"""Read a Hugging Face image processor's settings into a :class:`~safevlm.contract.preprocessing.Preprocessing`.

What the processor classes of transformers 5.17 do when a key is absent stands in one table; what a
``preprocessor_config.json`` may hold without changing a pixel in another. Everything else is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NoReturn

from pydantic import ValidationError

from safevlm.checkpoint.families import FAMILIES
from safevlm.contract.preprocessing import PIL_FILTERS, Filter, Preprocessing
from safevlm.errors import InputError
from safevlm.files.json_file import first_problem

__all__ = ["DEFAULT_GRID", "read_processor"]

DEFAULT_GRID = 448
"""Side, in pixels, of the fixed grid of a tower that takes many sizes."""

_CLIP: dict[str, Any] = {
    "size": {"shortest_edge": 224},
    "default_to_square": False,
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "resample": 3,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
_HALF = [0.5, 0.5, 0.5]
_SIGLIP: dict[str, Any] = {
    "size": {"height": 224, "width": 224},
    "default_to_square": False,
    "resample": 3,
    "image_mean": _HALF,
    "image_std": _HALF,
}
_GEMMA3 = {**_SIGLIP, "default_to_square": True, "resample": 2}
_QWEN2_VL: dict[str, Any] = {
    "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
    "resample": 3,
    "image_mean": _CLIP["image_mean"],
    "image_std": _CLIP["image_std"],
    "patch_size": 14,
    "merge_size": 2,
}

CLASS_DEFAULTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "CLIPImageProcessor": _CLIP,
        "LlavaImageProcessor": _CLIP,
        "SiglipImageProcessor": _SIGLIP,
        "Gemma3ImageProcessor": _GEMMA3,
        "Qwen2VLImageProcessor": _QWEN2_VL,
    }
)
"""The class attributes of transformers 5.17, by processor."""

ALIASES: Mapping[str, str] = MappingProxyType(
    {"CLIPFeatureExtractor": "CLIPImageProcessor", "Qwen2_5_VLImageProcessor": "Qwen2VLImageProcessor"}
)
"""Names that older releases wrote for the same processor."""

REQUIRED_TRUE = ("do_resize", "do_rescale", "do_normalize")
REQUIRED_OFF = ("do_pan_and_scan", "do_reduce_labels")
READ = frozenset(
    [
        "crop_size",
        "default_to_square",
        "do_center_crop",
        "do_pad",
        "feature_extractor_type",
        "image_aspect_ratio",
        "image_mean",
        "image_processor_type",
        "image_std",
        "max_pixels",
        "merge_size",
        "min_pixels",
        "patch_size",
        "resample",
        "rescale_factor",
        "size",
    ]
)
WITHOUT_EFFECT = frozenset(
    [
        "_name_or_path",
        "_valid_processor_keys",
        "auto_map",
        "crop_pct",
        "data_format",
        "device",
        "disable_grouping",
        "do_convert_rgb",
        "image_seq_length",
        "image_seq_len",
        "image_token",
        "input_data_format",
        "num_additional_image_tokens",
        "pad_size",
        "pan_and_scan_max_num_crops",
        "pan_and_scan_min_crop_size",
        "pan_and_scan_min_ratio_to_activate",
        "processor_class",
        "return_tensors",
        "temporal_patch_size",
        "transformers_version",
        "vision_feature_select_strategy",
        "backend",
    ]
)
"""Keys that change no pixel of one RGB image."""

_Settings = Mapping[str, Any]


def read_processor(processor: _Settings, *, family: str, grid: tuple[int, int] | None = None) -> Preprocessing:
    """Return the contract that the settings of a Hugging Face ``preprocessor_config.json`` state.

    ``grid`` is the fixed (height, width) of a tower that takes many sizes (Qwen2.5-VL; 448 x 448 unless the
    processor's own pixel limits exclude it). ``image_aspect_ratio`` of LLaVA's config may stand among the keys.
    Raises InputError for a key or value that the contract cannot express, naming it.
    """
    kind = _kind(processor, family)
    _check_keys(processor)
    settings = {**CLASS_DEFAULTS[kind], **_without_null(processor, kind)}
    geometry = _GEOMETRY[kind](settings, grid)
    try:
        return Preprocessing(
            **geometry,
            filter=_filter(settings),
            mean=_triple(settings, "image_mean"),
            std=_triple(settings, "image_std"),
            rescale=settings.get("rescale_factor", 1 / 255),
        )
    except ValidationError as error:
        raise InputError(f"image processor settings ({kind}) are not usable: {first_problem(error)}") from error


def _kind(processor: _Settings, family: str) -> str:
    """Return the processor's class name without the suffix of its backend."""
    if family not in FAMILIES:
        raise InputError(f"unknown model family {family!r}; allowed: {', '.join(FAMILIES)}")
    stated = processor.get("image_processor_type") or processor.get("feature_extractor_type")
    if stated is None:
        stated = FAMILIES[family].preprocessing["image_processor_type"]
    name = str(stated).removesuffix("Fast").removesuffix("Pil")
    name = ALIASES.get(name, name)
    if name not in CLASS_DEFAULTS:
        raise InputError(
            f"image_processor_type {stated!r} is not known; allowed: {', '.join(CLASS_DEFAULTS)}. "
            "Check the checkpoint's preprocessor_config.json."
        )
    return name


def _without_null(processor: _Settings, kind: str) -> dict[str, Any]:
    """Return what is stated. A null stays null in transformers: a flag is off then, another default is lost."""
    stated = {key: value for key, value in processor.items() if value is not None}
    for key in processor.keys() - stated.keys():
        if CLASS_DEFAULTS[kind].get(key) is None or (kind, key) == ("Qwen2VLImageProcessor", "size"):
            continue
        if not isinstance(CLASS_DEFAULTS[kind][key], bool):
            _refuse(key, None, "a value, or leave the key out")
        stated[key] = False
    return stated


def _check_keys(processor: _Settings) -> None:
    for key in REQUIRED_TRUE:
        if not processor.get(key, True):
            _refuse(key, processor[key], "true; a guard bundle always resizes and normalises")
    for key in REQUIRED_OFF:
        if processor.get(key):
            _refuse(key, processor[key], "false or absent; a guard judges the image as a whole")
    known = READ | WITHOUT_EFFECT | {*REQUIRED_TRUE, *REQUIRED_OFF}
    for key, value in processor.items():
        if key not in known and value is not None and value is not False:
            _refuse(key, value, "the settings of " + ", ".join(CLASS_DEFAULTS) + " in transformers 5.17")


def _refuse(key: str, value: object, allowed: str) -> NoReturn:
    raise InputError(
        f"image processor setting {key} = {value!r} is not supported; allowed: {allowed}. "
        "Correct preprocessor_config.json, or use the processor of the checkpoint's base model."
    )


def _filter(settings: _Settings) -> Filter:
    value = settings["resample"]
    for name, code in PIL_FILTERS.items():
        if value == int(code) and not isinstance(value, bool):
            return name
    _refuse("resample", value, ", ".join(f"{int(code)} ({name})" for name, code in PIL_FILTERS.items()))


def _triple(settings: _Settings, key: str) -> tuple[float, float, float]:
    value = settings[key]
    values = [value] * 3 if isinstance(value, (int, float)) else value
    if not isinstance(values, (list, tuple)) or len(values) != 3:
        _refuse(key, value, "three numbers, one a channel")
    return (values[0], values[1], values[2])


def _side(value: object, key: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        _refuse(key, value, "a whole number of pixels above 0")
    return value


def _size(settings: _Settings) -> dict[str, Any]:
    """Return ``size`` by its edges; what a lone number means depends on ``default_to_square``."""
    size = settings["size"]
    if isinstance(size, Mapping):
        return dict(size)
    if isinstance(size, (list, tuple)) and len(size) == 2:
        return {"height": size[0], "width": size[1]}
    side = _side(size, "size")
    return {"height": side, "width": side} if settings["default_to_square"] else {"shortest_edge": side}


def _rectangle(value: object, key: str) -> tuple[int, int]:
    """Return the (height, width) of a setting that is a number, a pair or has both keys."""
    if isinstance(value, Mapping):
        if set(value) != {"height", "width"}:
            _refuse(key, dict(value), "height and width")
        value = [value["height"], value["width"]]
    elif not isinstance(value, (list, tuple)) or len(value) != 2:
        value = [value, value]
    return _side(value[0], f"{key}.height"), _side(value[1], f"{key}.width")


def _check_grid(grid: tuple[int, int] | None, height: int, width: int) -> None:
    if grid is not None and tuple(grid) != (height, width):
        raise InputError(
            f"a grid of {grid[0]}x{grid[1]} is not possible: this vision tower reads only {height}x{width}. Leave the "
            "grid out; only Qwen2.5-VL takes one."
        )


def _clip(settings: _Settings, grid: tuple[int, int] | None) -> dict[str, Any]:
    size, cut = _size(settings), bool(settings["do_center_crop"])
    if set(size) == {"height", "width"}:
        return _siglip(settings, grid)
    if set(size) != {"shortest_edge"}:
        _refuse("size", size, "shortest_edge alone, or height and width")
    edge, pads = _side(size["shortest_edge"], "size.shortest_edge"), _pads(settings)
    if not cut and not pads:
        _refuse("do_center_crop", False, "true; otherwise the output has no fixed size")
    height, width = _rectangle(settings["crop_size"], "crop_size") if cut else (edge, edge)
    _check_grid(grid, height, width)
    if not pads:
        return {"height": height, "width": width, "fit": "crop", "shortest_edge": edge}
    if (height, width) != (edge, edge):
        _refuse("crop_size", settings["crop_size"], f"{edge}x{edge}, the shortest edge, when images are padded")
    return {"height": height, "width": width, "fit": "pad"}


def _pads(settings: _Settings) -> bool:
    """Say whether images are completed to a square first, as LLaVA-1.5's config states."""
    ratio = settings.get("image_aspect_ratio")
    if ratio not in (None, "pad", "square"):
        _refuse("image_aspect_ratio", ratio, "pad, square or absent")
    if settings.get("do_pad"):
        _refuse("do_pad", settings["do_pad"], "false or absent, except in a LlavaImageProcessor")
    return bool(ratio == "pad")


def _llava(settings: _Settings, grid: tuple[int, int] | None) -> dict[str, Any]:
    """Take ``do_pad`` of transformers' own LLaVA processor for what it does: padding to a square."""
    if settings.get("do_pad"):
        return _clip({**settings, "do_pad": False, "image_aspect_ratio": "pad"}, grid)
    return _clip(settings, grid)


def _siglip(settings: _Settings, grid: tuple[int, int] | None) -> dict[str, Any]:
    """Take the whole image to ``size``; a crop must change nothing."""
    if settings.get("do_center_crop") and _size(settings).keys() == {"height", "width"}:
        size = _size(settings)
        if _rectangle(settings.get("crop_size"), "crop_size") != _rectangle(size, "size"):
            _refuse("crop_size", settings.get("crop_size"), f"the same as size, {size}")
    return _whole(settings, grid)


def _whole(settings: _Settings, grid: tuple[int, int] | None) -> dict[str, Any]:
    height, width = _rectangle(_size(settings), "size")
    _check_grid(grid, height, width)
    if not _pads(settings):
        return {"height": height, "width": width, "fit": "squash"}
    if height != width:
        _refuse("size", dict(settings["size"]), "a square when images are padded to one")
    return {"height": height, "width": width, "fit": "pad"}


def _qwen2_vl(settings: _Settings, grid: tuple[int, int] | None) -> dict[str, Any]:
    patch, merge = _side(settings["patch_size"], "patch_size"), _side(settings["merge_size"], "merge_size")
    step = patch * merge
    if grid is None:
        side = _free_side(settings, step)
        return {"height": side, "width": side, "fit": "squash"}
    height, width = grid
    if height <= 0 or width <= 0 or height % step or width % step:
        near = [max(step, math.floor(side / step + 0.5) * step) for side in (height, width)]
        raise InputError(
            f"a grid of {height}x{width} is not possible: both sides must be multiples of {step} "
            f"(patch_size {patch} x merge_size {merge}). The nearest is {near[0]}x{near[1]}."
        )
    return {"height": height, "width": width, "fit": "squash"}


def _free_side(settings: _Settings, step: int) -> int:
    """Return the side of the square nearest to :data:`DEFAULT_GRID` that the pixel limits allow."""
    size = settings["size"]
    size = size if isinstance(size, Mapping) else _refuse("size", size, "shortest_edge and longest_edge")
    low = settings.get("min_pixels", size.get("min_pixels", size.get("shortest_edge")))
    high = settings.get("max_pixels", size.get("max_pixels", size.get("longest_edge")))
    low, high = _side(low, "min_pixels"), _side(high, "max_pixels")
    if low > high:
        _refuse("min_pixels", low, f"at most max_pixels, {high}")
    side = max(step, round(DEFAULT_GRID / step) * step)
    if side**2 > high:
        side = math.isqrt(high) // step * step
    elif side**2 < low:
        side = math.ceil(math.sqrt(low) / step) * step
    return max(step, side)


_GEOMETRY: Mapping[str, Callable[[_Settings, tuple[int, int] | None], dict[str, Any]]] = {
    "CLIPImageProcessor": _clip,
    "LlavaImageProcessor": _llava,
    "SiglipImageProcessor": _siglip,
    "Gemma3ImageProcessor": _whole,  # its class never crops
    "Qwen2VLImageProcessor": _qwen2_vl,
}
