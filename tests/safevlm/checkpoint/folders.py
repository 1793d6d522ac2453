"""Small random checkpoint folders in every tensor layout that is known to exist, and ways to damage them."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

WIDTH, CLASSES = 8, 20

HEAD = {
    "img_safety_head.mlp.0.weight": (WIDTH // 2, WIDTH),
    "img_safety_head.mlp.0.bias": (WIDTH // 2,),
    "img_safety_head.mlp.3.weight": (CLASSES, WIDTH // 2),
    "img_safety_head.mlp.3.bias": (CLASSES,),
}
LANGUAGE = {
    "model.language_model.embed_tokens.weight": (11, WIDTH),
    "model.language_model.layers.0.self_attn.q_proj.weight": (WIDTH, WIDTH),
    "model.language_model.layers.1.self_attn.q_proj.weight": (WIDTH, WIDTH),
    "model.language_model.norm.weight": (WIDTH,),
    "lm_head.weight": (11, WIDTH),
}
CANONICAL: dict[str, dict[str, tuple[int, ...]]] = {
    "llava": {
        "model.vision_tower.embeddings.class_embedding": (4,),
        "model.vision_tower.encoder.layers.0.mlp.fc1.weight": (4, 4),
        "model.multi_modal_projector.linear_1.weight": (WIDTH, 4),
        "model.multi_modal_projector.linear_1.bias": (WIDTH,),
        "model.multi_modal_projector.linear_2.weight": (WIDTH, WIDTH),
        "model.multi_modal_projector.linear_2.bias": (WIDTH,),
        **LANGUAGE,
        **HEAD,
    },
    "qwen2_5_vl": {
        "model.visual.patch_embed.proj.weight": (4, 3, 2, 2, 2),
        "model.visual.blocks.0.mlp.gate_proj.weight": (4, 4),
        "model.visual.merger.mlp.0.weight": (4, 4),
        "model.visual.merger.mlp.2.weight": (WIDTH, 4),
        **LANGUAGE,
        **HEAD,
    },
    "gemma3": {
        "model.vision_tower.embeddings.patch_embedding.weight": (4, 3, 2, 2),
        "model.vision_tower.encoder.layers.0.mlp.fc1.weight": (4, 4),
        "model.multi_modal_projector.mm_input_projection_weight": (4, WIDTH),
        "model.multi_modal_projector.mm_soft_emb_norm.weight": (4,),
        **{name: shape for name, shape in LANGUAGE.items() if name != "lm_head.weight"},
        **HEAD,
    },
}
"""Canonical name -> shape; Gemma ties its output matrix, so it has none."""

OLD = {
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}
LAYOUTS: dict[str, tuple[str, dict[str, str]]] = {
    "original LLaVA": (
        "llava",
        {
            "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
            "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
            "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
            "model.language_model.": "model.",
        },
    ),
    "old transformers LLaVA": ("llava", {**OLD, "model.vision_tower.": "vision_tower.vision_model."}),
    "new transformers LLaVA": ("llava", {}),
    "new transformers LLaVA, vision_model level": (
        "llava",
        {"model.vision_tower.": "model.vision_tower.vision_model."},
    ),
    "LLaVA as transformers 5 saves it": ("llava", {**OLD, "model.vision_tower.": "vision_tower."}),
    "old transformers LLaVA below model.": (
        "llava",
        {
            "model.language_model.": "model.language_model.model.",
            "lm_head.": "model.language_model.lm_head.",
            "model.vision_tower.": "model.vision_tower.vision_model.",
        },
    ),
    "prefixed LLaVA head": ("llava", {"img_safety_head.": "model.img_safety_head."}),
    "old Qwen": ("qwen2_5_vl", {"model.visual.": "visual.", "model.language_model.": "model."}),
    "new Qwen": ("qwen2_5_vl", {}),
    "prefixed Qwen head": ("qwen2_5_vl", {"img_safety_head.": "base_model.model.img_safety_head."}),
    "old Gemma": ("gemma3", {**OLD, "model.vision_tower.": "vision_tower.vision_model."}),
    "new Gemma": ("gemma3", {"model.vision_tower.": "model.vision_tower.vision_model."}),
    "Gemma as transformers 5 saves it": ("gemma3", {**OLD, "model.vision_tower.": "vision_tower."}),
}
"""Layout -> family key, and canonical prefix -> stored prefix (what is not named keeps its name)."""

CONFIG: dict[str, Any] = {"model_type": "nonsense", "text_config": {"hidden_size": WIDTH}}


def stored_name(layout: str, canonical: str) -> str:
    for prefix, stored in LAYOUTS[layout][1].items():
        if canonical.startswith(prefix):
            return stored + canonical.removeprefix(prefix)
    return canonical


def random_tensors(layout: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return float16 tensors by stored name; the values depend on seed and canonical name only."""
    generator = torch.Generator().manual_seed(seed)
    shapes = CANONICAL[LAYOUTS[layout][0]]
    return {stored_name(layout, name): torch.randn(shapes[name], generator=generator).half() for name in sorted(shapes)}


def write_folder(
    folder: Path,
    layout: str = "new Gemma",
    *,
    config: Mapping[str, Any] = CONFIG,
    shard_of: Callable[[str], str] | None = None,
    tensors: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Write a checkpoint; with ``shard_of`` (stored name -> file) as shards and an index."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = random_tensors(layout) if tensors is None else tensors
    if shard_of is None:
        save_file(dict(tensors), folder / "model.safetensors")
    else:
        placed = {name: shard_of(name) for name in tensors}
        for shard in set(placed.values()):
            save_file({name: tensors[name] for name in tensors if placed[name] == shard}, folder / shard)
        write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": placed})
    write_json(folder / "config.json", dict(config))
    return folder


def three_shards(name: str) -> str:
    """Vision, language model and head each in a shard of its own."""
    if "img_safety_head" in name:
        return "model-00003-of-00003.safetensors"
    vision = any(part in name for part in ("vision", "visual", "projector"))
    return "model-00001-of-00003.safetensors" if vision else "model-00002-of-00003.safetensors"


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def write_safetensors(path: Path, header: Any, data: bytes = b"") -> Path:
    """Write a file with any header, true or not."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path
