"""What is stored and not read is left out, what is read and cannot be written is named, and the rest is as on torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor

from export.gguf.artifact import GgufOptions, export_gguf
from export.gguf.families.llava import _by_layer
from export.gguf.vision import vision_tensors
from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.errors import CheckpointError, InputError
from tests.export.gguf.geometries import write_geometry

LAYER = "model.language_model.layers.1."
UNREAD = {
    "llava": ("model.vision_tower.embeddings.position_ids", "model.language_model.rotary_emb.inv_freq"),
    "qwen2_5_vl": ("model.visual.rotary_pos_emb.inv_freq", f"{LAYER}self_attn.o_proj.bias"),
    "gemma3": ("model.vision_tower.head.attention.in_proj_weight", f"{LAYER}mlp.down_proj.weight_zero_point"),
}


def export(folder: Path, out: Path, **options: Any) -> set[str]:
    """Export with parity checked and return the names of all tensors in the files."""
    export_gguf(open_checkpoint(folder), out, GgufOptions(**{"type": "f16", "parity_images": 1, **options}))
    return {tensor.name for path in out.glob("*.gguf") for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("family", sorted(UNREAD))
def test_what_torch_does_not_read_is_not_written(family: str, tmp_path: Path) -> None:
    def more(tensors: dict[str, Tensor]) -> None:
        tensors |= {name: torch.full((3,), float("nan")) for name in UNREAD[family]}

    plain = export(write_geometry(family, tmp_path / "a"), tmp_path / "plain")
    assert export(write_geometry(family, tmp_path / "b", change=more), tmp_path / "more") == plain


def test_a_pooling_head_of_siglip_is_left_out(tmp_path: Path) -> None:
    folder = write_geometry("gemma3", tmp_path / "checkpoint", vision={"vision_use_head": True})
    assert any(".head." in name for name in open_checkpoint(folder).vision_names())
    assert not any("head" in name for name in export(folder, tmp_path / "out"))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_projector_with_a_bias_and_without(bias: bool, kind: str, tmp_path: Path) -> None:
    folder = write_geometry("llava", tmp_path / "checkpoint", top={"multimodal_projector_bias": bias})
    assert {"mm.0.bias", "mm.2.bias"} <= export(folder, tmp_path / "out", mmproj_type=kind)


@pytest.mark.parametrize("family", sorted(UNREAD))
def test_an_mlp_as_wide_as_the_tower(family: str, tmp_path: Path) -> None:
    """llama.cpp swaps its two linears, as old files had their names the wrong way round."""
    folder = write_geometry(family, tmp_path / "checkpoint", vision={"hidden_size": 64, "intermediate_size": 64})
    export(folder, tmp_path / "out")


def test_grey_levels_that_are_not_divided_by_255(tmp_path: Path) -> None:
    folder = write_geometry("llava", tmp_path / "checkpoint")
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rescale_factor": 1 / 127.5}))
    export(folder, tmp_path / "out")


def test_columns_of_several_layers_are_put_in_llama_cpps_order() -> None:
    states = {layer: torch.randn(4, generator=torch.Generator().manual_seed(layer)) for layer in (1, 2, 3)}
    for layers in ((1, 2, 3), (3, 1), (2, 2), (3, 1, 3, 2), (2,)):
        weight = torch.randn(5, 4 * len(layers), generator=torch.Generator().manual_seed(9))
        wanted = weight @ torch.cat([states[layer] for layer in layers])
        found = _by_layer(layers, weight) @ torch.cat([states[layer] for layer in sorted({*layers})])
        torch.testing.assert_close(found, wanted)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llava", {"text": {"num_key_value_heads": 3}}, "4 attention heads and 3 key-value heads"),
    ("llava", {"text": {"head_dim": 47}}, "heads of width 47"),
    ("llava", {"text": {"hidden_act": "gelu"}}, "activation 'gelu' of the language model"),
    ("llava", {"vision": {"hidden_act": "relu"}}, "hidden_act = 'relu' of the vision tower"),
    ("llava", {"top": {"vision_feature_select_strategy": "full"}}, "vision_feature_select_strategy = 'full'"),
    ("qwen2_5_vl", {"vision": {"window_size": 56}}, "window_size = 56"),
    ("qwen2_5_vl", {"vision": {"hidden_size": 36}}, "num_heads = 2 does not divide hidden_size = 36"),
    ("qwen2_5_vl", {"vision": {"patch_size": 64}}, "window_size = 112"),
    ("qwen2_5_vl", {"vision": {"depth": 4, "fullatt_block_indexes": [0, 3]}}, r"layers \[0, 3\] of 4"),
    ("gemma3", {"text": {"attention_bias": True}}, r"gemma3 does not support '.*0\.self_attn\.o_proj\.bias'"),
    ("gemma3", {"text": {"attn_logit_softcapping": 9.0}}, r"attn_logit_softcapping = 9\.0"),
    ("gemma3", {"text": {"use_bidirectional_attention": True}}, "use_bidirectional_attention = True"),
]


@pytest.mark.parametrize(("family", "geometry", "told"), REFUSED)
def test_what_would_fail_in_llama_cpp_is_refused_by_name(
    family: str, geometry: dict[str, Any], told: str, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(write_geometry(family, tmp_path / "checkpoint", **geometry))
    with pytest.raises(CheckpointError, match=told):
        export_gguf(checkpoint, tmp_path / "out", GgufOptions(type="f16"))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_too_few_image_tokens_for_llama_cpp(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_geometry("qwen2_5_vl", tmp_path / "checkpoint"))
    with pytest.raises(InputError, match=r"56x84 pixels are 6 image tokens; llama\.cpp accepts 8 to 4,096"):
        export_gguf(checkpoint, tmp_path / "out", GgufOptions(type="f16", grid=(56, 84)))


@pytest.mark.parametrize(
    "lose",
    [
        lambda tensors: tensors.pop(f"{LAYER}mlp.up_proj.weight"),
        lambda tensors: tensors.pop("model.multi_modal_projector.linear_2.bias"),
    ],
)
def test_what_is_read_and_missing_is_named(lose: Callable[[dict[str, Tensor]], None], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_geometry("llava", tmp_path / "checkpoint", change=lose))
    with pytest.raises(CheckpointError, match=r"the checkpoint lacks '.*(up_proj\.weight|linear_2\.bias)'"):
        vision_tensors(checkpoint, "f16")
        export_gguf(checkpoint, tmp_path / "out", GgufOptions(type="f16"))
