"""Gemma-3: SigLIP vision tower, 4x4 average pooling, one input projection, sliding-window language model."""

from __future__ import annotations

from models.family import HEAD_RENAME, LANGUAGE_RENAMES, Family, PromptFormat, Rename

__all__ = ["GEMMA3"]

GEMMA3 = Family(
    key="gemma3",
    title="SafeGem",
    renames=(
        HEAD_RENAME,
        Rename(r"^(?:model\.)?vision_tower\.(?:vision_model\.)?", "model.vision_tower."),
        Rename(r"^(?:model\.)?multi_modal_projector\.", "model.multi_modal_projector."),
        *LANGUAGE_RENAMES,
    ),
    evidence=(
        "model.multi_modal_projector.mm_input_projection_weight",
        "model.multi_modal_projector.mm_soft_emb_norm.weight",
    ),
    default_tap="projector",
    vision_prefixes=("model.vision_tower.", "model.multi_modal_projector."),
    prompt=PromptFormat(
        before_image="<bos><start_of_turn>user\n\n\n<start_of_image>",
        image_token="<image_soft_token>",
        after_image="<end_of_image>\n\n",
        after_question="<end_of_turn>\n<start_of_turn>model\n",
        end_of_turn="<end_of_turn>",
        before_text="<bos><start_of_turn>user\n",
    ),
    processor_source="google/gemma-3-12b-it",
    preprocessing={
        "image_processor_type": "Gemma3ImageProcessor",
        "size": {"height": 896, "width": 896},
        "resample": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    },
    auto_processor="Gemma3ImageProcessor",
    auto_model_type="gemma3",
)
