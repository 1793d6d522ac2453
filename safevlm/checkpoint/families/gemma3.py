"""Gemma-3: SigLIP vision tower, 4x4 average pooling, one input projection, sliding-window language model."""

from __future__ import annotations

from safevlm.checkpoint.family import HEAD_RENAME, LANGUAGE_RENAMES, Family, Rename
from safevlm.network.dialogue import ChatFormat

__all__ = ["GEMMA3"]

GEMMA3 = Family(
    key="gemma3",
    title="SafeGem",
    tiny="tiny-safegem",
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
    chat=ChatFormat(
        opening="<bos>",
        system=None,
        folded_end="\n\n",
        user=("<start_of_turn>user\n", "<end_of_turn>\n"),
        assistant=("<start_of_turn>model\n", "<end_of_turn>\n"),
        image=("\n\n<start_of_image>", "<end_of_image>\n\n"),
        image_token="<image_soft_token>",
        answer="<start_of_turn>model\n",
        end_of_turn="<end_of_turn>",
        strict=True,
        trimmed=True,
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
    half="BF16",  # its activations exceed float16
    norm_offset=1.0,
    mlp_norm="pre_feedforward_layernorm",  # "post attention" is another norm there
)
