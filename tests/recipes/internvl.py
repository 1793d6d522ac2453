"""A family that is not one of ours, InternVL, as CONTRIBUTING says to add one: its tables and a tiny checkpoint.

In the tree each table is a file: ``safevlm/checkpoint/families/internvl.py`` (``FACTS``),
``safevlm/checkpoint/architectures/internvl.py`` (``TRANSFORMERS``), a class in ``export/guard/trunks.py``
(``InternTrunk``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLModel, InternVLVisionConfig
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from export.guard.trunks import Trunk, last_map
from safevlm.checkpoint.architectures import Architecture
from safevlm.checkpoint.configs.stated_shapes import Shapes
from safevlm.checkpoint.configs.text_section import known_keys, nested_section, text_section
from safevlm.checkpoint.family import HEAD_RENAME, LANGUAGE_RENAMES, Family, Rename
from safevlm.network.dialogue import ChatFormat
from safevlm.network.geometry import SquareGeometry
from safevlm.network.reference import VisionPath

KEY = "internvl"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>")
SIDE, WIDTH, VOCAB, CLASSES = 56, 64, 200, 20

FACTS = Family(
    key=KEY,
    title="SafeInternVL",
    tiny="tiny-safeintern",
    renames=(
        HEAD_RENAME,
        Rename(r"^(?:model\.)?vision_tower\.", "model.vision_tower."),
        Rename(r"^(?:model\.)?multi_modal_projector\.", "model.multi_modal_projector."),
        *LANGUAGE_RENAMES,
    ),
    evidence=("model.vision_tower.embeddings.cls_token", "model.multi_modal_projector.layer_norm.weight"),
    default_tap="projector",
    vision_prefixes=("model.vision_tower.", "model.multi_modal_projector."),
    chat=ChatFormat(
        opening="",
        system=("<|im_start|>system\n", "<|im_end|>\n"),
        user=("<|im_start|>user\n", "<|im_end|>\n"),
        assistant=("<|im_start|>assistant\n", "<|im_end|>\n"),
        image=("<img>", "</img>\n"),
        image_token="<IMG_CONTEXT>",
        answer="<|im_start|>assistant\n",
        end_of_turn="<|im_end|>",
        strict=False,
    ),
    processor_source="OpenGVLab/InternVL3-1B-hf",
    preprocessing={
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": SIDE, "width": SIDE},
        "resample": 3,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    },
    auto_processor="SiglipImageProcessor",
    auto_model_type="internvl",
)


def _config(raw: Mapping[str, Any], shapes: Shapes) -> InternVLConfig:
    text = text_section(raw, (InternVLConfig, Qwen2Config), shapes)
    vision = known_keys(nested_section(raw, "vision_config") or {}, InternVLVisionConfig)
    shapes.layers(
        vision, "vision_config.", "num_hidden_layers", "model.vision_tower.encoder.layer.", InternVLVisionConfig
    )
    text.setdefault("hidden_size", shapes.need("model.multi_modal_projector.linear_2.weight")[0])
    return InternVLConfig(
        text_config=Qwen2Config(**text),
        vision_config=InternVLVisionConfig(**vision),
        tie_word_embeddings=text["tie_word_embeddings"],
    )


def _geometry(config: Any) -> SquareGeometry:
    side, patch = config.vision_config.image_size[0], config.vision_config.patch_size[0]
    return SquareGeometry(side, int(side // patch * config.downsample_ratio) ** 2)


TRANSFORMERS = Architecture(
    processor_class="InternVLProcessor",
    config_class=InternVLConfig,
    build_config=_config,
    inner_class=InternVLModel,
    whole_class=InternVLForConditionalGeneration,
    rotary_class=Qwen2RotaryEmbedding,
    geometry=_geometry,
)


class InternTrunk(Trunk):
    """InternViT without its class token, patches merged four to one, and the projector's first layer."""

    def __init__(self, vision: VisionPath) -> None:
        super().__init__()
        tower: Any = vision.tower
        projector: Any = vision.projector
        self.embeddings, self.layers, self.end = tower.embeddings, tower.encoder.layer, tower.layernorm
        self.norm, self.linear, self.act = projector.layer_norm, projector.linear_1, projector.act
        self.side = vision.config.vision_config.image_size[0] // vision.config.vision_config.patch_size[0]
        self.last = last_map(projector.linear_2.weight, projector.linear_2.bias)

    def forward(self, pixels_NCHW: Tensor) -> Tensor:
        """Return N × T × M tokens before ``linear_2``."""
        hidden = self.embeddings(pixels_NCHW)
        for layer in self.layers:
            hidden = layer(hidden)
        grid = self.end(hidden)[:, 1:].unflatten(1, (self.side // 2, 2, self.side // 2, 2))
        merged = grid.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)
        tokens: Tensor = self.act(self.linear(self.norm(merged)))
        return tokens


def write_tiny(folder: Path) -> tuple[Any, nn.Sequential]:
    """Write a random checkpoint; return transformers' own model and the guard head, to compare with."""
    torch.manual_seed(0)
    text = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": [SIDE, SIDE],
        "patch_size": [14, 14],
    }
    config = InternVLConfig(
        text_config=Qwen2Config(**text), vision_config=InternVLVisionConfig(**vision), tie_word_embeddings=False
    )
    model: Any = InternVLForConditionalGeneration(config).eval()
    head = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, CLASSES)).eval()
    for parameter in (*model.parameters(), *head.parameters()):
        if parameter.ndim > 1:
            parameter.data = torch.randn_like(parameter) / math.sqrt(parameter[0].numel())
    head[3].get_parameter("weight").data *= 8  # verdicts, not twenty equal probabilities
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    tensors |= {f"img_safety_head.mlp.{name}": tensor for name, tensor in head.state_dict().items()}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    stated = json.loads(config.to_json_string(use_diff=False))
    stated["safety_categories"] = ["safe", *(f"class_{i}" for i in range(1, CLASSES))]
    (folder / "config.json").write_text(json.dumps(stated))
    (folder / "preprocessor_config.json").write_text(json.dumps(FACTS.preprocessing))
    _write_tokenizer(folder)
    return model, head


def _write_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=160, special_tokens=list(SPECIAL), show_progress=False)
    tokenizer.train_from_iterator(["What is drawn? user system assistant\n"], trainer)
    tokenizer.add_special_tokens([AddedToken(FACTS.chat.image_token, special=True, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
