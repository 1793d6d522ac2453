"""Tiny random checkpoints at any geometry, with the tokenizer of the family's tiny checkpoint.

Models are transformers' own classes, so what a config means is what transformers makes of it; every count that the
export depends on is stated in ``config.json``.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    SiglipVisionConfig,
)

from benchmarks.tiny.blueprints import BLUEPRINTS
from safevlm.checkpoint.checkpoint import open_checkpoint

CLASSES = 20
TINY = {"llava": "tiny-safellava", "qwen2_5_vl": "tiny-safeqwen", "gemma3": "tiny-safegem"}
LIGHT = ("tokenizer", "special_tokens_map", "merges", "vocab", "chat_template", "preprocessor_config")
Sections = Mapping[str, Mapping[str, Any]]

TEXT: dict[str, dict[str, Any]] = {
    "llava": {"head_dim": 32},
    "qwen2_5_vl": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}},
    "gemma3": {
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}
VISION: dict[str, dict[str, Any]] = {
    "llava": {"num_attention_heads": 2, "num_hidden_layers": 3},
    "qwen2_5_vl": {"num_heads": 2, "depth": 2, "fullatt_block_indexes": [1], "in_channels": 3},
    "gemma3": {"num_attention_heads": 2, "num_hidden_layers": 2, "vision_use_head": False},
}


def build(family: str, text: Mapping[str, Any], vision: Mapping[str, Any], top: Mapping[str, Any]) -> Any:
    """Return transformers' model of a family: two decoder layers of width 128 but for what is given."""
    blueprint = BLUEPRINTS[TINY[family]]
    language = {
        "vocab_size": blueprint.text["vocab_size"],
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        **{key: blueprint.text.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
        **TEXT[family],
        **text,
    }
    tower = {"hidden_size": 64, "intermediate_size": 96, "patch_size": 14, **VISION[family], **vision}
    if family == "llava":
        clip = CLIPVisionConfig(**{"image_size": 84, **tower})
        return LlavaForConditionalGeneration(
            LlavaConfig(text_config=LlamaConfig(**language), vision_config=clip, **{"image_token_index": 0, **top})
        )
    if family == "gemma3":
        siglip = SiglipVisionConfig(**{"image_size": 112, **tower})
        return Gemma3ForConditionalGeneration(
            Gemma3Config(
                text_config=Gemma3TextConfig(**language),
                vision_config=siglip,
                tie_word_embeddings=language["tie_word_embeddings"],
                **{"mm_tokens_per_image": 4, "image_token_index": 0, **top},
            )
        )
    model: Callable[[Any], Any] = Qwen2_5_VLForConditionalGeneration  # untyped
    return model(
        Qwen2_5_VLConfig(
            text_config=language,
            vision_config={"window_size": 112, "out_hidden_size": language["hidden_size"], **tower},
            tie_word_embeddings=language["tie_word_embeddings"],
            **{"image_token_id": 0, **top},
        )
    )


def write_geometry(
    family: str,
    folder: Path,
    *,
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
    top: Mapping[str, Any] | None = None,
    state: Mapping[str, Any] | None = None,
    change: Callable[[dict[str, Tensor]], None] = lambda tensors: None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a random checkpoint in transformers' layout; ``state`` and ``change`` alter its config and tensors."""
    torch.manual_seed(seed)
    model = build(family, text or {}, vision or {}, top or {})
    width = model.config.get_text_config().hidden_size
    head = nn.Sequential(nn.Linear(width, width // 2), nn.GELU(), nn.Dropout(0.1), nn.Linear(width // 2, CLASSES))
    for parameter in [*model.parameters(), *head.parameters()]:
        scale = 1.0 / math.sqrt(parameter[0].numel()) if parameter.ndim > 1 else 0.1
        kept = parameter.data if parameter.ndim == 1 else torch.zeros_like(parameter)
        parameter.data = kept + torch.randn_like(parameter) * scale
    head[3].get_parameter("weight").data *= 8  # verdicts, not twenty equal probabilities
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight")
    tensors |= {f"img_safety_head.mlp.{name}": tensor.clone() for name, tensor in head.state_dict().items()}
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    change(tensors)
    folder.mkdir(parents=True)
    tiny = open_checkpoint(TINY[family]).folder
    for path in tiny.iterdir():
        if path.name.startswith(LIGHT):
            shutil.copy(path, folder)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = json.loads(model.config.to_json_string(use_diff=False))
    guard = {"safety_categories": [f"class_{i}" for i in range(CLASSES)], "num_safety_categories": CLASSES}
    config = {**config, **guard, "safevlm_edge_random_weights": True, **(state or {})}
    (folder / "config.json").write_text(json.dumps(config))
    _write_processor(family, model.config.vision_config, folder)
    return folder


def _write_processor(family: str, vision: Any, folder: Path) -> None:
    path = folder / "preprocessor_config.json"
    processor = json.loads(path.read_text())
    if family == "llava":
        side = vision.image_size
        processor |= {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    if family == "gemma3":
        processor |= {"size": {"height": vision.image_size, "width": vision.image_size}}
    if family == "qwen2_5_vl":
        processor |= {"patch_size": vision.patch_size, "merge_size": vision.spatial_merge_size}
    path.write_text(json.dumps(processor))
