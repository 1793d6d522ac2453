"""Small random checkpoints of the three families, written in the layouts that are known to exist.

Models are made by transformers' own classes and kept, so that a test can compute with them independently.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
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
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

WIDTH, VOCAB, CLASSES = 128, 200, 20
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
VIT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "patch_size": 14,
    "image_size": 56,
}
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
SPECIAL = {
    "llava": ["<unk>", "<s>", "</s>"],
    "qwen2_5_vl": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"],
    "gemma3": [
        "<pad>",
        "<eos>",
        "<bos>",
        "<start_of_turn>",
        "<end_of_turn>",
        "<start_of_image>",
        "<end_of_image>",
    ],
}
IMAGE_TOKEN = {"llava": "<image>", "qwen2_5_vl": "<|image_pad|>", "gemma3": "<image_soft_token>"}
IMAGE_ID = VOCAB - 1
"""Of the image token in the models that transformers runs; no text holds it."""
SIZE = {"llava": (56, 56), "qwen2_5_vl": (112, 84), "gemma3": (56, 56)}
"""Height and width of the images given to each family."""
TOKENS = {"llava": 16, "qwen2_5_vl": 12, "gemma3": 4}
QUESTIONS = ("What is drawn?", "Is the red square safe to keep next to the blue circle?", "Why?")
LAYOUTS = (
    ("llava", "hf"),
    ("llava", "original"),
    ("qwen2_5_vl", "hf"),
    ("qwen2_5_vl", "old"),
    ("gemma3", "hf"),
)
CORPUS = [
    *QUESTIONS,
    "user system assistant model You are a helpful assistant. USER: ASSISTANT: A chat between",
] * 3


@dataclass
class Written:
    """A checkpoint on disk and the model it was written from."""

    family: str
    folder: Path
    model: Any
    head: nn.Sequential

    def images(self, count: int, seed: int = 0) -> Tensor:
        """Return random N × H × W × 3 uint8 images of the family's size."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, 256, (count, *SIZE[self.family], 3), generator=generator, dtype=torch.uint8)

    def pixels(self, images: Tensor) -> dict[str, Tensor]:
        """Return what transformers' image processor makes of images that are at size already."""
        arrays = [image.numpy() for image in images]
        keep = {"do_resize": False, "return_tensors": "pt"}
        if self.family == "llava":
            processor = CLIPImageProcessorPil(do_center_crop=False, image_mean=CLIP_MEAN, image_std=CLIP_STD)
            return {"pixel_values": processor(arrays, **keep)["pixel_values"]}
        if self.family == "gemma3":
            return {"pixel_values": Gemma3ImageProcessorPil()(arrays, **keep)["pixel_values"]}
        return dict(Qwen2VLImageProcessorPil()(arrays, **keep))

    def features(self, images: Tensor) -> Tensor:
        """Return transformers' own N × T × D projector output."""
        with torch.no_grad():
            return torch.stack(tuple(self.model.get_image_features(**self.pixels(images)).pooler_output))

    def probs(self, tapped: Tensor) -> Tensor:
        """Apply the head as it was written: mean over tokens, two Linears with an exact GELU, softmax."""
        with torch.no_grad():
            return torch.softmax(self.head(tapped.mean(1)), -1)

    def full_forward(self, images: Tensor, ids: list[list[int]]) -> Any:
        """Run transformers' whole model on equally long rows, the image token at every -200."""
        rows = torch.tensor(ids)
        image = rows == -200
        rows = rows.masked_fill(image, IMAGE_ID)
        kinds = {"gemma3": "token_type_ids", "qwen2_5_vl": "mm_token_type_ids"}
        extra = {kinds[self.family]: image.int()} if self.family in kinds else {}
        with torch.no_grad():
            return self.model(
                input_ids=rows,
                attention_mask=torch.ones_like(rows),
                output_hidden_states=True,
                **self.pixels(images),
                **extra,
            )


def stand_in(checkpoint: Path, folder: Path) -> Path:
    """Copy a checkpoint, its config marked as benchmarks.random_checkpoint marks random weights."""
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "safevlm_edge_random_weights": True}))
    return folder


def write_checkpoint(family: str, layout: str, folder: Path, seed: int = 0) -> Written:
    """Make a random model of a family and write it into ``folder`` in one of its layouts."""
    torch.manual_seed(seed)
    model = {"llava": _llava, "qwen2_5_vl": _qwen, "gemma3": _gemma}[family]()
    head = nn.Sequential(nn.Linear(WIDTH, WIDTH // 2), nn.GELU(), nn.Dropout(0.1), nn.Linear(WIDTH // 2, CLASSES))
    parameters: list[nn.Parameter] = [*model.parameters(), *head.parameters()]
    for parameter in parameters:
        scale = 1.0 / math.sqrt(parameter[0].numel()) if parameter.ndim > 1 else 0.1
        kept = parameter.data if parameter.ndim == 1 else torch.zeros_like(parameter)
        parameter.data = kept + torch.randn_like(parameter) * scale
    model.model.language_model.embed_tokens.weight.data *= 0.1  # or a tied model repeats its input
    head[3].get_parameter("weight").data *= 8  # verdicts, not twenty equal probabilities
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    config = _config(family, layout, model.config)
    tensors = {_stored_name(family, layout, name): tensor for name, tensor in tensors.items()}
    tensors |= {f"img_safety_head.mlp.{name}": tensor for name, tensor in head.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(_processor(family)))
    _write_tokenizer(family, folder, with_image_token=layout != "original")
    return Written(family, folder, model.eval(), head.eval())


def _llava() -> Any:
    rope: dict[str, Any] = {"rope_theta": 20000.0}
    config = LlavaConfig(
        text_config=LlamaConfig(**TEXT, **rope),
        vision_config=CLIPVisionConfig(**VIT, num_attention_heads=1),
        image_token_index=IMAGE_ID,
    )
    return LlavaForConditionalGeneration(config)


def _gemma() -> Any:
    rope: dict[str, Any] = {"rope_local_base_freq": 5000.0, "rope_theta": 500000.0}
    no_pooling: dict[str, Any] = {"vision_use_head": False}
    text = Gemma3TextConfig(
        **TEXT,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
        **rope,
    )
    vision = SiglipVisionConfig(**VIT, num_attention_heads=2, **no_pooling)
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=IMAGE_ID)
    return Gemma3ForConditionalGeneration(config)


def _qwen() -> Any:
    rope = {"type": "mrope", "mrope_section": [4, 6, 6]}
    config = Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_scaling": rope, "rope_theta": 300000.0, "rms_norm_eps": 1e-6},
        vision_config={
            "depth": 3,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_heads": 2,
            "patch_size": 14,
            "window_size": 56,
            "out_hidden_size": WIDTH,
            "fullatt_block_indexes": [1],
        },
        image_token_id=IMAGE_ID,
        tie_word_embeddings=False,
    )
    model_class: Any = Qwen2_5_VLForConditionalGeneration  # untyped
    return model_class(config)


def _stored_name(family: str, layout: str, name: str) -> str:
    swaps = {
        "original": {
            "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
            "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
            "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
            "model.language_model.": "model.",
        },
        "old": {"model.visual.": "visual.", "model.language_model.": "model."},
        "hf": {},
    }
    for new, old in swaps[layout].items():
        if name.startswith(new):
            return old + name.removeprefix(new)
    return name


def _config(family: str, layout: str, config: Any) -> dict[str, Any]:
    guard = {"safety_categories": [f"class_{i}" for i in range(CLASSES)], "num_safety_categories": CLASSES}
    if layout == "original":
        named: dict[str, Any] = {
            "mm_vision_tower": "some/clip-tower",
            "mm_hidden_size": 64,
            "mm_vision_select_layer": -2,
        }
        named["vision_config"] = {"num_attention_heads": 1, "num_hidden_layers": 3}  # what no tensor shows
        text = {
            **TEXT,
            "rms_norm_eps": 1e-6,
            "rope_theta": 20000.0,
            "rope_scaling": None,
            "hidden_act": "silu",
        }
        stray: dict[str, Any] = {
            "model_type": "safellava_llama",
            "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "patch",
            "pad_token_id": -1,
        }
        stray["auto_map"] = {"AutoConfig": "config_safellava.Config", "AutoModel": "safellava.Model"}
        return {**text, **named, **stray, "torch_dtype": "float16", "tie_word_embeddings": False, **guard}
    if layout == "old":
        rope = {"type": "mrope", "mrope_section": [4, 6, 6]}
        vision = {
            "depth": 3,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_heads": 2,
            "in_chans": 3,
            "spatial_patch_size": 14,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        }
        text = {**TEXT, "rms_norm_eps": 1e-6, "rope_theta": 300000.0, "rope_scaling": rope}
        return {
            **text,
            "vision_config": vision,
            "model_type": "qwen2_5_vl",
            "tie_word_embeddings": False,
            **guard,
        }
    return {**json.loads(config.to_json_string(use_diff=False)), **guard}


def _processor(family: str) -> dict[str, Any]:
    height, width = SIZE[family]
    clip = {"image_mean": CLIP_MEAN, "image_std": CLIP_STD, "resample": 3}
    if family == "llava":
        size = {"size": {"shortest_edge": height}, "crop_size": {"height": height, "width": width}}
        return {"image_processor_type": "CLIPImageProcessor", **size, "do_center_crop": True, **clip}
    if family == "qwen2_5_vl":
        sizes = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
        return {"image_processor_type": "Qwen2VLImageProcessor", **sizes, **clip}
    halves = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2}
    return {
        "image_processor_type": "Gemma3ImageProcessor",
        "size": {"height": height, "width": width},
        **halves,
    }


def _write_tokenizer(family: str, folder: Path, *, with_image_token: bool) -> None:
    """Write a small BPE tokenizer: SentencePiece's word marks for LLaVA and Gemma, bytes for Qwen."""
    special = list(SPECIAL[family])
    if family == "qwen2_5_vl":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer = Tokenizer(models.BPE(unk_token=special[0]))
        scheme = "first" if family == "llava" else "never"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.BpeTrainer(vocab_size=160, special_tokens=special, initial_alphabet=["\n"], show_progress=False)
    tokenizer.train_from_iterator([*CORPUS, "\n"], trainer)
    tokenizer.add_tokens([f"word{i}" for i in range(tokenizer.get_vocab_size(), IMAGE_ID)])
    if with_image_token:
        tokenizer.add_special_tokens([AddedToken(IMAGE_TOKEN[family], special=True, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {
        "llava": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
        "qwen2_5_vl": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        "gemma3": {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
    }
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names[family]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
