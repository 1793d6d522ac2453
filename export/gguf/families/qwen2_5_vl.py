"""Qwen2.5-VL in llama.cpp: ``qwen2vl`` with the projector ``qwen2.5vl_merger``."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor

from export.gguf.families.family import GgufFamily, GgufLanguage, GgufVision, Part, head_width
from export.gguf.families.vit import require, with_leaves
from safevlm.contract.preprocessing import Preprocessing
from safevlm.errors import CheckpointError, InputError

__all__ = ["QWEN2_5_VL"]

SECTIONS = (16, 24, 24)
WINDOW = 112
"""Pixels; fixed in llama.cpp."""
TOKENS = (8, 4096)
"""Image tokens that llama.cpp's Qwen2.5-VL takes without resizing the image."""
LAYER = {
    "norm1": "ln1",
    "norm2": "ln2",
    "attn.proj": "attn_out",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
PATCHES = "model.visual.patch_embed.proj.weight"


def _sections(text: Any) -> list[int]:
    """Return how many frequencies turn by time, row and column; the default is that of transformers' module."""
    return list(text.rope_parameters.get("mrope_section", SECTIONS))


def _language_keys(writer: Any, text: Any) -> None:
    writer.add_rope_dimension_sections([*_sections(text), 0])


def _check(text: Any) -> None:
    sections, width = _sections(text), head_width(text)
    if len(sections) != 3 or 2 * sum(sections) != width:
        raise CheckpointError(
            f"config.json states mrope_section = {sections} for heads of width {width}; three numbers whose sum is "
            f"{width // 2} are needed. Fetch config.json again."
        )
    sliding = sum(kind != "full_attention" for kind in text.layer_types)
    if sliding:
        raise CheckpointError(
            f"config.json asks for sliding-window attention in {sliding} of {text.num_hidden_layers} layers; "
            "llama.cpp's qwen2vl supports only full attention. Use another runtime."
        )


def _vision_keys(writer: Any, config: Any) -> None:
    tower = config.vision_config
    require(tower, "hidden_act", "silu")
    require(tower, "window_size", WINDOW)
    require(tower, "spatial_merge_size", 2)
    writer.add_vision_image_size(560)  # of no effect: sizes are free
    writer.add_vision_head_count(tower.num_heads)
    writer.add_vision_attention_layernorm_eps(1e-6)
    writer.add_vision_use_silu(True)
    writer.add_vision_n_wa_pattern(_full_attention_every(tower))
    writer.add_vision_spatial_merge_size(tower.spatial_merge_size)


def _full_attention_every(tower: Any) -> int:
    """Return n where every n-th layer has full attention and the others windows; 0 where all have full attention."""
    full, depth = sorted({index for index in tower.fullatt_block_indexes if 0 <= index < tower.depth}), tower.depth
    if full == list(range(depth)):
        return 0
    every: int = full[0] + 1 if full else depth + 1
    if full != list(range(every - 1, depth, every)):
        raise CheckpointError(
            f"config.json states full attention in layers {full} of {depth}; llama.cpp supports it in every n-th "
            "layer, in all or in none. Use another runtime."
        )
    return every


def _layers_read(config: Any) -> int:
    return int(config.vision_config.depth)


def _check_size(config: Any, preprocessing: Preprocessing) -> None:
    tower = config.vision_config
    side = tower.patch_size * tower.spatial_merge_size
    tokens = preprocessing.height * preprocessing.width // side**2
    fewest, most = TOKENS
    if not fewest <= tokens <= most:
        raise InputError(
            f"images of {preprocessing.height}x{preprocessing.width} pixels are {tokens} image tokens; llama.cpp "
            f"accepts {fewest} to {most:,} for Qwen2.5-VL. Give another --grid in multiples of {side} pixels."
        )


def _frames(_: Any, place: str, shape: tuple[int, ...]) -> Iterator[Part]:
    """Yield the kernels of the two frames that a still image stands for."""
    if shape[2] != 2:
        raise CheckpointError(f"'{PATCHES}' spans {shape[2]} frames; llama.cpp's Qwen2.5-VL supports 2.")
    for frame, end in ((0, ""), (1, ".1")):
        yield Part(place + end, (*shape[:2], *shape[3:]), partial(_frame, frame))


def _frame(number: int, tensor: Tensor) -> Tensor:
    return tensor[:, :, number]


QWEN2_5_VL = GgufFamily(
    language=GgufLanguage(architecture="qwen2vl", set_keys=_language_keys, check=_check, pre_tokenizer="qwen2"),
    vision=GgufVision(
        projector="qwen2.5vl_merger",
        layer_prefix="model.visual.blocks.",
        layer=LAYER,
        split={"attn.qkv": ("attn_q", "attn_k", "attn_v")},
        others={
            PATCHES: "v.patch_embd.weight",
            "model.visual.merger.ln_q.weight": "v.post_ln.weight",
            **with_leaves({"model.visual.merger.mlp.0": "mm.0", "model.visual.merger.mlp.2": "mm.2"}),
        },
        changed={PATCHES: _frames},
        set_keys=_vision_keys,
        layers_read=_layers_read,
        check_size=_check_size,
        head_count="num_heads",
        channels="in_channels",
        head_width_unit=4,  # its rotary embedding has two axes
    ),
)
