"""Tiny models of the three families whose weights follow from their tensors' names, and what they compute.

The same weights come out under every transformers and every tensor layout, so a release that no longer runs here can
be asked once what it makes of its own config (see ``tests/fixtures/world/configs/README.md``):
``python -m tests.safevlm.checkpoint.seeded_models OUT CASE…`` under that release writes ``OUT/VERSION-CASE.json``.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from safevlm.checkpoint.families import FAMILIES

TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
VIT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 4,
    "image_size": 16,
}
QWEN_VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 4,
    "window_size": 16,
    "out_hidden_size": 64,
    "fullatt_block_indexes": [1],
}
GEMMA: dict[str, Any] = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 6, "sliding_window_pattern": 2}
IMAGE_ID = 63
HEAD = {
    "img_safety_head.mlp.0.weight": (32, 64),
    "img_safety_head.mlp.0.bias": (32,),
    "img_safety_head.mlp.3.weight": (20, 32),
    "img_safety_head.mlp.3.bias": (20,),
}
YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0}
MROPE: dict[str, Any] = {"mrope_section": [2, 3, 3]}
LONG: dict[str, Any] = {
    "rope_type": "longrope",
    "short_factor": [1.0 + i / 10 for i in range(8)],
    "long_factor": [2.0 + i for i in range(8)],
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llava-yarn-original": (
        "llava",
        {"rope_scaling": {**YARN, "original_max_position_embeddings": 32}, "max_position_embeddings": 64},
    ),
    "llava-yarn-mscale": (
        "llava",
        {"rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3}, "max_position_embeddings": 64},
    ),
    "llava-longrope-beside": (
        "llava",
        {"rope_scaling": LONG, "max_position_embeddings": 64, "original_max_position_embeddings": 8},
    ),
    "llava-longrope-inside": (
        "llava",
        {
            "rope_scaling": {**LONG, "factor": 4.0, "original_max_position_embeddings": 8},
            "max_position_embeddings": 64,
        },
    ),
    "llava-two-types": (
        "llava",
        {
            "rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 4.0},
            "max_position_embeddings": 8,
        },
    ),
    "llava-tied": ("llava", {"tie_word_embeddings": True}),
    "llava-default-heads": ("llava", {"num_attention_heads": 32, "num_key_value_heads": 32}),
    "qwen2_5_vl-yarn-original": (
        "qwen2_5_vl",
        {
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, **MROPE},
            "max_position_embeddings": 64,
        },
    ),
    "qwen2_5_vl-sliding": (
        "qwen2_5_vl",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen2_5_vl-unused-window": ("qwen2_5_vl", {"use_sliding_window": False, "sliding_window": 4}),
    "gemma3-linear": (
        "gemma3",
        {
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "rope_theta": 50000.0,
            "rope_local_base_freq": 2000.0,
        },
    ),
}
"""Case -> family, and what its language model's config is given beside the widths."""


def release() -> tuple[int, int]:
    """Return major and minor number of the transformers at hand."""
    major, minor = transformers.__version__.split(".")[:2]
    return int(major), int(minor)


def model_of(family: str, text: dict[str, Any], vision: dict[str, Any] | None = None, **top: Any) -> Any:
    """Return transformers' model of a family at the widths above, its weights seeded by name."""
    vision = vision or {}
    if family == "llava":
        sections = {
            "text_config": {"model_type": "llama", **TEXT, **text},
            "vision_config": {"model_type": "clip_vision_model", **VIT, **vision},
        }
        config = transformers.LlavaConfig(**sections, image_token_index=IMAGE_ID, **top)
        model: Any = transformers.LlavaForConditionalGeneration(config)
    elif family == "gemma3":
        sections = {
            "text_config": {**TEXT, **GEMMA, **text},
            "vision_config": {**VIT, "vision_use_head": False, **vision},
        }
        config = transformers.Gemma3Config(**sections, image_token_index=IMAGE_ID, mm_tokens_per_image=4, **top)
        model = transformers.Gemma3ForConditionalGeneration(config)
    else:
        language = {**TEXT, "rope_scaling": {"type": "mrope", **MROPE}, "bos_token_id": 1, "eos_token_id": 2, **text}
        placed = language if release() < (4, 52) else {"text_config": language}  # flat, before
        tokens = {"image_token_id": IMAGE_ID, "video_token_id": 62, "vision_start_token_id": 61}
        config = transformers.Qwen2_5_VLConfig(**placed, vision_config={**QWEN_VISION, **vision}, **tokens, **top)
        model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    return seed_weights(family, model)


def seed_weights(family: str, model: Any) -> Any:
    """Give every parameter the values that its canonical name stands for; tied ones are one."""
    model.tie_weights()
    for name, parameter in model.named_parameters():  # names a tied one once, the input embedding first
        canonical = FAMILIES[family].canonical(name) or name
        parameter.data = seeded(canonical, tuple(parameter.shape))
    model.tie_weights()
    return model.eval()


def seeded(name: str, shape: tuple[int, ...]) -> Tensor:
    """Return values for a tensor that follow from its name: norms near 1, matrices of even gain."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if len(shape) <= 1:
        return 0.1 * noise + float(not name.endswith("bias"))
    gain = 0.3 if "embed_tokens" in name else 2.0
    return noise * gain / math.sqrt(math.prod(shape[1:]))


def seeded_head() -> dict[str, Tensor]:
    """Return a guard head's tensors."""
    return {name: seeded(name, shape) for name, shape in HEAD.items()}


def inputs(family: str) -> tuple[dict[str, Tensor], Tensor]:
    """Return one prompt with one image of 16 x 16, and the mask of its image tokens."""
    rgb = torch.rand((3, 16, 16), generator=torch.Generator().manual_seed(1))
    tokens = 16 if family == "llava" else 4
    rows = torch.tensor([[5, 61, *[IMAGE_ID] * tokens, 60, *range(8, 28)]])
    image = rows == IMAGE_ID
    given = {"input_ids": rows, "attention_mask": torch.ones_like(rows), "pixel_values": rgb[None]}
    if family == "gemma3":
        given["token_type_ids"] = image.int()
    if family == "qwen2_5_vl":
        frames = rgb.repeat(2, 1, 1, 1).reshape(2, 3, 2, 2, 4, 2, 2, 4).permute(2, 5, 3, 6, 1, 0, 4, 7)
        given |= {"pixel_values": frames.reshape(16, -1), "image_grid_thw": torch.tensor([[1, 4, 4]])}
        if release() >= (5, 0):
            given["mm_token_type_ids"] = image.int()
    return given, image


def computed(family: str, model: Any) -> dict[str, Tensor]:
    """Return the guard's 20 logits at the language model's tap, and the next token's first 8."""
    given, image = inputs(family)
    with torch.no_grad():
        output = model(**given, output_hidden_states=True)
    head = seeded_head()
    pooled = output.hidden_states[-1][image].mean(0)
    inner = torch.nn.functional.linear(pooled, *(head[f"img_safety_head.mlp.0.{kind}"] for kind in ("weight", "bias")))
    guard = torch.nn.functional.linear(
        torch.nn.functional.gelu(inner), *(head[f"img_safety_head.mlp.3.{kind}"] for kind in ("weight", "bias"))
    )
    return {"guard": guard, "logits": output.logits[0, -1, :8]}


def main() -> None:
    """Write each case as the transformers at hand writes its config, with what it computes."""
    folder = Path(sys.argv[1])
    for case in sys.argv[2:]:
        family, text = CASES[case]
        model = model_of(family, json.loads(json.dumps(text)))
        with tempfile.TemporaryDirectory() as scratch:
            model.config.save_pretrained(scratch)
            config = json.loads((Path(scratch) / "config.json").read_text())
        numbers = {
            key: [round(value, 5) for value in values.tolist()] for key, values in computed(family, model).items()
        }
        path = folder / f"{transformers.__version__}-{case}.json"
        path.write_text(json.dumps({"config": config, **numbers}, indent=0) + "\n")


if __name__ == "__main__":
    main()
