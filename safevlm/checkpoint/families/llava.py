"""LLaVA-1.5: CLIP vision tower read at layer -2 without CLS, two-layer projector, Llama."""

from __future__ import annotations

from safevlm.checkpoint.family import FLAT_LANGUAGE_RENAME, HEAD_RENAME, LANGUAGE_RENAMES, Family, OwnSetting, Rename
from safevlm.network.dialogue import ChatFormat

__all__ = ["LLAVA", "NAMED_TOWERS", "UNNAMED_TOWER"]

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)

LLAVA = Family(
    key="llava",
    title="SafeLLaVA",
    tiny="tiny-safellava",
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
    # LLaVA's `conversation.py`, "vicuna_v1": no space follows the end of an answer.
    chat=ChatFormat(
        opening="<s>",
        system=("", " "),
        default_system=SYSTEM,
        user=("USER: ", " "),
        assistant=("ASSISTANT: ", "</s>"),
        image=("", "\n"),
        image_token="<image>",
        answer="ASSISTANT:",
        end_of_turn="</s>",
        strict=True,
    ),
    image_linear="model.multi_modal_projector.linear_2",
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
    # `mm_vision_select_layer` and `mm_vision_select_feature` by safevlm.checkpoint.configs.transformers_config.
    # `mm_patch_merge_type` and `image_grid_pinpoints` act on anyres images alone.
    own_settings=(
        OwnSetting("image_aspect_ratio", (None, "square", "pad"), "gives the image another shape or cuts it"),
        OwnSetting("mm_use_im_start_end", (None, False), "puts <im_start> and <im_end> around the image"),
        OwnSetting("s2", (None, False), "reads the image at several scales"),
        OwnSetting("mm_resampler_type", (None, "identity"), "resamples the image's features"),
    ),
)

_LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
}
_BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}

UNNAMED_TOWER = {**_LARGE, "image_size": 336}
"""The vision tower of transformers' ``LlavaConfig`` where a config has no ``vision_config``."""
NAMED_TOWERS = {
    "clip-vit-large-patch14-336": UNNAMED_TOWER,
    "clip-vit-large-patch14": {**_LARGE, "image_size": 224},
    "clip-vit-base-patch16": {**_BASE, "patch_size": 16, "image_size": 224},
    "clip-vit-base-patch32": {**_BASE, "patch_size": 32, "image_size": 224},
    "tiny-clip-patch14-84": {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 5,
        "num_attention_heads": 2,
        "patch_size": 14,
        "image_size": 84,
    },
}
"""What original LLaVA configs only name (``mm_vision_tower``): ``CLIPVisionConfig`` of the four that OpenAI published,
and of the tiny checkpoint here; what is not said is the class's default."""
