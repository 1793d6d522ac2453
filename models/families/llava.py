"""LLaVA-1.5: CLIP vision tower read at layer -2 without CLS, two-layer projector, Llama."""

from __future__ import annotations

from models.family import FLAT_LANGUAGE_RENAME, HEAD_RENAME, LANGUAGE_RENAMES, Family, OwnSetting, PromptFormat, Rename

__all__ = ["LLAVA"]

OPENING = (
    "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. USER: "
)

LLAVA = Family(
    key="llava",
    title="SafeLLaVA",
    renames=(
        HEAD_RENAME,
        # The original repository: everything under `model.`, the projector as `mm_projector.{0,2}`.
        Rename(r"^model\.vision_tower\.vision_tower\.(?:vision_model\.)?", "model.vision_tower."),
        Rename(r"^model\.mm_projector\.0\.", "model.multi_modal_projector.linear_1."),
        Rename(r"^model\.mm_projector\.2\.", "model.multi_modal_projector.linear_2."),
        # transformers, with and without `model.`, and with CLIP's former `vision_model.` level.
        Rename(r"^(?:model\.)?vision_tower\.(?:vision_model\.)?", "model.vision_tower."),
        Rename(r"^(?:model\.)?multi_modal_projector\.", "model.multi_modal_projector."),
        *LANGUAGE_RENAMES,
        FLAT_LANGUAGE_RENAME,
    ),
    evidence=(
        "model.multi_modal_projector.linear_1.weight",
        "model.multi_modal_projector.linear_2.weight",
        "model.vision_tower.embeddings.class_embedding",
    ),
    default_tap="language_model",
    vision_prefixes=("model.vision_tower.", "model.multi_modal_projector."),
    prompt=PromptFormat(
        before_image=OPENING,
        image_token="<image>",
        after_image="\n",
        after_question=" ASSISTANT:",
        end_of_turn="</s>",
        before_text=OPENING,
    ),
    processor_source="openai/clip-vit-large-patch14-336",
    preprocessing={
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 336},
        "crop_size": {"height": 336, "width": 336},
        "do_center_crop": True,
        "resample": 3,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    },
    auto_processor="LlavaImageProcessor",
    auto_model_type="llava",
    # Read by LLaVA's `mm_utils.process_images`, `builder` and `conversation`; `mm_projector_type`,
    # `mm_vision_select_layer` and `mm_vision_select_feature` by models.transformers_config. `mm_patch_merge_type` and
    # `image_grid_pinpoints` act on anyres images alone.
    own_settings=(
        OwnSetting("image_aspect_ratio", (None, "square", "pad"), "gives the image another shape or cuts it"),
        OwnSetting("mm_use_im_start_end", (None, False), "puts <im_start> and <im_end> around the image"),
        OwnSetting("s2", (None, False), "reads the image at several scales"),
        OwnSetting("mm_resampler_type", (None, "identity"), "resamples the image's features"),
    ),
)
