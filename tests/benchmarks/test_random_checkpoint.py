"""Stand-ins: the published layouts at real shapes, shortened, sparse, marked as random."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest

from benchmarks import random_checkpoint as module
from benchmarks.random_checkpoint import write_random_checkpoint
from benchmarks.shapes.random_vlm import config_and_class
from benchmarks.shapes.shapes import VisionShape, find_shape, shape_names
from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.checkpoint.configs.transformers_config import build_config
from safevlm.errors import InputError
from safevlm.network.filling import on_meta
from tests.benchmarks.shapes.test_random_guard import SMALL, small_shape

PUBLISHED = {
    "llava": ("model.layers.0.self_attn.q_proj.weight", "model.mm_projector.0.weight"),
    "qwen2_5_vl": ("model.layers.0.self_attn.q_proj.weight", "visual.merger.mlp.0.weight"),
    "gemma3": (
        "language_model.model.layers.0.self_attn.q_proj.weight",
        "vision_tower.vision_model.post_layernorm.weight",
    ),
}
BILLIONS = {
    "SafeLLaVA-7B": 7.06,
    "SafeLLaVA-13B": 13.35,
    "SafeQwen2.5-VL-7B": 8.29,
    "SafeQwen2.5-VL-32B": 33.45,
    "SafeGem-12B": 12.19,
    "SafeGem-27B": 27.43,
}
"""Parameters of the published base models, in billions."""


def small(family: str) -> VisionShape:
    shape = small_shape(family)
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 256, "vocab_size": 1024}
    return VisionShape(**{**vars(shape), "language": {"num_hidden_layers": 4, **heads}})


@pytest.mark.parametrize("name", shape_names())
def test_the_six_have_the_parameters_of_their_bases(name: str) -> None:
    shape = find_shape(name)
    config, model_class = config_and_class(shape, int(shape.language["num_hidden_layers"]))
    model = on_meta(lambda: model_class(config))
    total = sum(parameter.numel() for parameter in model.parameters())  # a tied one counts once
    assert total / 1e9 == pytest.approx(BILLIONS[name], rel=0.01)


@pytest.mark.parametrize("family", SMALL)
@pytest.mark.parametrize("layout", ["published", "transformers"])
def test_a_stand_in_opens_as_what_it_stands_for(family: str, layout: module.Layout, tmp_path: Path) -> None:
    shape = small(family)
    written = write_random_checkpoint(shape, tmp_path / "out", layers=2, layout=layout, shard_bytes=400_000)
    checkpoint = open_checkpoint(str(tmp_path / "out"))
    assert checkpoint.family.key == family and checkpoint.random_weights
    assert build_config(checkpoint).text_config.num_hidden_layers == 2
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1, "it is sharded"
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    stored = {checkpoint.tensors.stored_name(name) for name in checkpoint.tensors.names()}
    assert set(PUBLISHED[family]) <= stored or layout == "transformers"
    assert written == sum(2 * math.prod(checkpoint.tensors.shape(name)) for name in checkpoint.tensors.names())


def test_holes_take_no_disk_and_read_as_zeros(tmp_path: Path) -> None:
    shape = small("llava")
    whole, sparse = tmp_path / "whole", tmp_path / "sparse"
    assert write_random_checkpoint(shape, whole) == write_random_checkpoint(shape, sparse, sparse=True)
    sizes = {folder: (folder / "model.safetensors").stat() for folder in (whole, sparse)}
    assert sizes[whole].st_size == sizes[sparse].st_size
    assert sizes[sparse].st_blocks < sizes[whole].st_blocks
    tensors, dense = open_checkpoint(str(sparse)).tensors, open_checkpoint(str(whole)).tensors
    hole, kept = "model.language_model.layers.3.mlp.up_proj.weight", "model.multi_modal_projector.linear_1.weight"
    assert not tensors.read(hole).any() and dense.read(hole).any()
    assert tensors.read(kept).equal(dense.read(kept))
    assert (tensors.read("model.language_model.layers.3.input_layernorm.weight") == 1).all()


def test_a_disk_that_cannot_hold_it_is_told_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 2**30))  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"about 13\.\d GiB are needed, .* has only 1\.0 GiB free\. .*--sparse"):
        write_random_checkpoint(find_shape("SafeLLaVA-7B"), tmp_path / "out")
    assert not list(tmp_path.iterdir())
