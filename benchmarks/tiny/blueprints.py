"""What each tiny checkpoint is built from: shapes, the config it ships, the stored names of its tensors.

Small, but of the real kind: language-model widths are multiples of 256, heads are 64 wide, the vision towers
keep their families' geometry (LLaVA reads layer -2 without CLS, Qwen has 112-pixel windows and 2x2 merging,
Gemma pools 4x4 patches), Gemma-3 has one full-attention layer after five sliding ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.tiny.tokenizers import PIECES, train_gemma, train_llama, train_qwen

__all__ = ["BLUEPRINTS", "Blueprint"]

_GUARD_KEYS: dict[str, Any] = {
    "num_safety_categories": 20,
    "safety_head_hidden_scale": 0.5,
    "safety_num_hidden_layers": 1,
    "safety_loss_lambda": 1.0,
}
_CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
_CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
_VOCABULARY = PIECES + 64


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """One tiny checkpoint before training.

    ``text``, ``vision`` and ``top`` are the fields of transformers' own config; ``config`` is the ``config.json`` that
    ships; ``stored`` turns canonical tensor names into the layout that ships, by ``re.sub`` rules tried in order.
    """

    name: str
    family: str
    text: dict[str, Any]
    vision: dict[str, Any]
    config: dict[str, Any]
    processor: dict[str, Any]
    stored: tuple[tuple[str, str], ...]
    image_tokens: int
    train_tokenizer: Callable[[Iterable[str], Path], None]
    top: Mapping[str, Any] = field(default_factory=dict)
    drawn: Mapping[str, float] = field(default_factory=dict)
    """Parameters of the inner model that transformers leaves at zero, and the deviation to draw them with."""
    batched_tower: bool = False
    """Whether the tower runs over all images at once, compiled as a whole: transformers' own takes them one by one."""

    def stored_name(self, canonical: str) -> str:
        """Return the name under which a canonical tensor is written."""
        for pattern, replacement in self.stored:
            name, count = re.subn(pattern, replacement, canonical)
            if count:
                return name
        return canonical


_LLAMA = {
    "vocab_size": PIECES,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_CLIP = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "image_size": 84,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
TINY_SAFELLAVA = Blueprint(
    name="tiny-safellava",
    family="llava",
    text={"model_type": "llama", **_LLAMA},
    vision={"model_type": "clip_vision_model", **_CLIP},
    config={
        "architectures": ["SafeLlavaLlamaForCausalLM"],
        "model_type": "safellava_llama",
        **_LLAMA,
        "mm_vision_tower": "safevlm-edge/tiny-clip-patch14-84",
        "mm_hidden_size": 128,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "torch_dtype": "float16",
        **_GUARD_KEYS,
    },
    processor={
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": 84},
        "do_center_crop": True,
        "crop_size": {"height": 84, "width": 84},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": _CLIP_MEAN,
        "image_std": _CLIP_STD,
        "do_convert_rgb": True,
    },
    stored=(
        (r"^model\.vision_tower\.", "model.vision_tower.vision_tower.vision_model."),
        (r"^model\.multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
        (r"^model\.multi_modal_projector\.linear_2\.", "model.mm_projector.2."),
        (r"^model\.language_model\.", "model."),
    ),
    image_tokens=6 * 6,
    train_tokenizer=train_llama,
)

_QWEN_TEXT = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
    "use_sliding_window": False,
    "tie_word_embeddings": False,
    "bos_token_id": 629,
    "eos_token_id": 631,
}
_QWEN_VISION = {
    "depth": 4,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_heads": 2,
    "hidden_act": "silu",
    "out_hidden_size": 256,
    "patch_size": 14,
    "spatial_patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [1, 3],
    "tokens_per_second": 2,
    "in_channels": 3,
}
TINY_SAFEQWEN = Blueprint(
    name="tiny-safeqwen",
    family="qwen2_5_vl",
    text=_QWEN_TEXT,
    vision=_QWEN_VISION,
    config={
        "architectures": ["SafeQwen2_5_VLForConditionalGeneration"],
        "model_type": "safeqwen2_5_vl",
        **_QWEN_TEXT,
        "vision_config": {"model_type": "qwen2_5_vl", **_QWEN_VISION},
        "vision_start_token_id": 638,
        "vision_end_token_id": 639,
        "vision_token_id": 640,
        "image_token_id": 641,
        "video_token_id": 642,
        "torch_dtype": "float16",
        **_GUARD_KEYS,
    },
    processor={
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "min_pixels": 168 * 168,
        "max_pixels": 168 * 168,
        "resample": 3,
        "image_mean": _CLIP_MEAN,
        "image_std": _CLIP_STD,
    },
    stored=((r"^model\.visual\.", "visual."), (r"^model\.language_model\.", "model.")),
    image_tokens=6 * 6,
    train_tokenizer=train_qwen,
    top={"image_token_id": 641},
    batched_tower=True,
)

_GEMMA_TEXT = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "query_pre_attn_scalar": 64,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "sliding_window": 32,
    "sliding_window_pattern": 6,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_SIGLIP = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 112,
    "patch_size": 14,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "vision_use_head": False,
}
TINY_SAFEGEM = Blueprint(
    name="tiny-safegem",
    family="gemma3",
    text=_GEMMA_TEXT,
    vision=_SIGLIP,
    config={
        "architectures": ["SafeGemma3ForConditionalGeneration"],
        "model_type": "safegemma3",
        "text_config": {"model_type": "gemma3_text", **_GEMMA_TEXT},
        "vision_config": {"model_type": "siglip_vision_model", **_SIGLIP},
        "mm_tokens_per_image": 4,
        "boi_token_index": 6,
        "eoi_token_index": 7,
        "image_token_index": PIECES,
        "eos_token_id": [1, 5],
        "torch_dtype": "float16",
        **_GUARD_KEYS,
    },
    processor={
        "image_processor_type": "Gemma3ImageProcessor",
        "processor_class": "Gemma3Processor",
        "do_resize": True,
        "size": {"height": 112, "width": 112},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_convert_rgb": True,
        "do_pan_and_scan": None,
        "image_seq_length": 4,
    },
    stored=(
        (r"^model\.vision_tower\.", "vision_tower.vision_model."),
        (r"^model\.multi_modal_projector\.", "multi_modal_projector."),
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
    ),
    image_tokens=2 * 2,
    train_tokenizer=train_gemma,
    top={"mm_tokens_per_image": 4},
    drawn={"multi_modal_projector.mm_input_projection_weight": 0.06},
)

BLUEPRINTS = {blueprint.name: blueprint for blueprint in (TINY_SAFELLAVA, TINY_SAFEQWEN, TINY_SAFEGEM)}
