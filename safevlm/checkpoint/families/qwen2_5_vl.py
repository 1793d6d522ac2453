"""Qwen2.5-VL: windowed vision tower with two-axis rotary, 2x2 patch merger, Qwen2.5 with three-axis rotary."""

from __future__ import annotations

from safevlm.checkpoint.family import FLAT_LANGUAGE_RENAME, HEAD_RENAME, LANGUAGE_RENAMES, Family, Rename
from safevlm.network.dialogue import ChatFormat

__all__ = ["QWEN2_5_VL"]

QWEN2_5_VL = Family(
    key="qwen2_5_vl",
    title="SafeQwen2.5-VL",
    tiny="tiny-safeqwen",
    renames=(
        HEAD_RENAME,
        Rename(r"^(?:model\.)?visual\.", "model.visual."),
        *LANGUAGE_RENAMES,
        FLAT_LANGUAGE_RENAME,
    ),
    evidence=(
        "model.visual.patch_embed.proj.weight",
        "model.visual.merger.mlp.2.weight",
        "model.visual.blocks.0.mlp.gate_proj.weight",
    ),
    default_tap="language_model",
    vision_prefixes=("model.visual.",),
    chat=ChatFormat(
        opening="",
        system=("<|im_start|>system\n", "<|im_end|>\n"),
        default_system="You are a helpful assistant.",
        user=("<|im_start|>user\n", "<|im_end|>\n"),
        assistant=("<|im_start|>assistant\n", "<|im_end|>\n"),
        image=("<|vision_start|>", "<|vision_end|>"),
        image_token="<|image_pad|>",
        answer="<|im_start|>assistant\n",
        end_of_turn="<|im_end|>",
        strict=False,
    ),
    image_linear="model.visual.merger.mlp.2",
    processor_source="Qwen/Qwen2.5-VL-7B-Instruct",
    preprocessing={
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": 14,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "resample": 3,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    },
    auto_processor="Qwen2VLImageProcessor",
    auto_model_type="qwen2_5_vl",
    free_grid=True,
)
