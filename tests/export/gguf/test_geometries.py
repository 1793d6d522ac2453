"""Any geometry: llama.cpp computes what transformers does, or the export refuses by name before it writes a model."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassError
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from export.gguf.artifact import GgufOptions, export_gguf
from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.errors import InputError
from tests.export.gguf.geometries import write_geometry

EXAMPLES = 8
"""Of each family; some 840 in all were run when this was written."""

HEADS = st.sampled_from([(1, 1), (2, 1), (4, 2), (4, 4), (3, 1), (6, 3), (4, 3)])
"""With key-value heads."""
WIDTHS = st.sampled_from([32, 6, 8, 16, 24, 48, 48, 64, 80, 15])
INNER = st.sampled_from([64, 32, 96, 128, 128, 70])
TYPES = st.sampled_from(["f16", "f32", "bf16", "f16", "f32", "q8_0", "q4_0"])
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
ROPES: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    | {"original_max_position_embeddings": 64},
    YARN,
    YARN | {"beta_fast": 8.0},
    YARN | {"attention_factor": 1.3},
    {"rope_type": "dynamic", "factor": 4.0},
]


@st.composite
def language(draw: st.DrawFn, family: str) -> dict[str, Any]:
    """Draw a text config; most, not all, are ones that llama.cpp computes."""
    (heads, groups), width = draw(HEADS), draw(WIDTHS)
    text: dict[str, Any] = {
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "hidden_size": heads * width if family == "qwen2_5_vl" else heads * 32,
        "intermediate_size": draw(INNER),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "tie_word_embeddings": draw(st.booleans()),
    }
    rope = {"rope_theta": draw(st.sampled_from([1e4, 1e6]))} | draw(st.sampled_from(ROPES))
    if family == "qwen2_5_vl":
        half = width // 2
        first = draw(st.integers(0, half))
        second = draw(st.integers(0, half - first))
        return text | {"rope_parameters": rope | {"mrope_section": [first, second, half - first - second]}}
    text["head_dim"] = width
    if family == "llava":
        act = draw(st.sampled_from([*["silu"] * 7, "gelu"]))
        biases = {"attention_bias": draw(st.booleans()), "mlp_bias": draw(st.booleans())}
        return text | {"rope_parameters": rope, "hidden_act": act} | biases
    kinds = st.sampled_from(["sliding_attention", "full_attention"])
    return text | {
        "query_pre_attn_scalar": draw(st.sampled_from([width, 32])),
        "sliding_window": draw(st.sampled_from([1, 8, 64])),
        "layer_types": draw(st.lists(kinds, min_size=text["num_hidden_layers"], max_size=text["num_hidden_layers"])),
        "rope_parameters": {
            "full_attention": rope,
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    }


@st.composite
def tower(draw: st.DrawFn, family: str) -> tuple[dict[str, Any], dict[str, Any], tuple[int, int] | None]:
    """Draw a vision config, keys beside it, and the size of images where the family lets one choose."""
    heads, layers = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    hidden = heads * draw(st.sampled_from([8, 12, 16, 20, 32]))
    vision: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": draw(st.sampled_from([hidden, 50, 64, 96]))}
    patch = draw(st.sampled_from([7, 14, 16]))
    vision["patch_size"] = patch
    if family == "qwen2_5_vl":
        full = draw(st.sampled_from([range(layers), range(layers - 1, layers), range(1, layers, 2), (0,)]))
        vision |= {"num_heads": heads, "depth": layers, "fullatt_block_indexes": list(full)}
        sides = st.integers(2, 7)
        return vision, {}, (2 * patch * draw(sides), 2 * patch * draw(sides))
    vision |= {"num_attention_heads": heads, "num_hidden_layers": layers}
    if family == "llava":
        vision |= {"image_size": patch * draw(st.integers(2, 6)) + draw(st.sampled_from([0, 0, 3]))}
        vision |= {"hidden_act": draw(st.sampled_from([*["quick_gelu"] * 4, "gelu", "relu"]))}
        top = {"vision_feature_layer": draw(st.integers(-layers, -1))}
        return vision, top | {"multimodal_projector_bias": draw(st.booleans())}, None
    pooled, side = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    vision |= {"image_size": patch * pooled * side, "vision_use_head": draw(st.booleans())}
    return vision, {"mm_tokens_per_image": side * side}, None


@st.composite
def case(draw: st.DrawFn, family: str) -> dict[str, Any]:
    """Draw all that an export depends on."""
    vision, top, grid = draw(tower(family))
    options = GgufOptions(
        type=draw(TYPES),
        mmproj_type=draw(st.sampled_from(["f16", "f32", "bf16"])),
        grid=grid,
        parity_images=1,
    )
    return {"text": draw(language(family)), "vision": vision, "top": top, "options": options}


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_parity_or_a_refusal_before_anything_is_written(family: str) -> None:
    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
    @given(case(family))
    def check(drawn: dict[str, Any]) -> None:
        with tempfile.TemporaryDirectory() as place:
            assert holds(family, Path(place), drawn)

    check()


def holds(family: str, place: Path, drawn: dict[str, Any]) -> bool:
    """Export one geometry: true if llama.cpp agrees with torch, or nothing was written before the refusal."""
    options = drawn.pop("options")
    told: list[str] = []
    try:
        write_geometry(family, place / "checkpoint", **drawn)
    except (StrictDataclassError, ValueError):
        assume(False)  # transformers knows no such model
    try:
        export_gguf(open_checkpoint(place / "checkpoint"), place / "out", options, report=told.append)
    except InputError:
        return not told and not (place / "out").exists()
    return (place / "out" / "gguf.json").is_file()
