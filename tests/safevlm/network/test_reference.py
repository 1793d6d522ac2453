"""The reference guard equals transformers' own computation, and reads nothing of the language model."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.checkpoint.family import TapSource
from safevlm.checkpoint.weights.tensors import TensorStore
from safevlm.errors import CheckpointError, GuardHeadError, InputError
from safevlm.network.qwen_grid import flatten_patches
from safevlm.network.reference import build_reference_guard, build_vision
from tests.safevlm.checkpoint.random_checkpoints import LAYOUTS, SIZE, TOKENS, WIDTH, Written, write_checkpoint


def opened(written: Written, tap: TapSource = "projector") -> Any:
    return open_checkpoint(str(written.folder), tap=tap)


def grid_of(written: Written) -> tuple[int, int] | None:
    return SIZE[written.family] if written.family == "qwen2_5_vl" else None


def rewrite(written: Written, tensors: dict[str, torch.Tensor], drop: str = "") -> None:
    """Replace tensors of a checkpoint, and leave out those whose name contains ``drop``."""
    path = written.folder / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(path).items() if not drop or drop not in name}
    save_file(kept | tensors, path)


@pytest.mark.parametrize(("family", "layout"), LAYOUTS)
def test_probabilities_equal_transformers(family: str, layout: str, tmp_path: Path) -> None:
    written = write_checkpoint(family, layout, tmp_path)
    guard = build_reference_guard(opened(written), grid=grid_of(written))
    images = written.images(3)
    features = written.features(images)
    probs, logits = guard(images)
    assert features.shape == (3, TOKENS[family], WIDTH)
    torch.testing.assert_close(guard.features(images), features, atol=1e-5, rtol=0)
    torch.testing.assert_close(probs, written.probs(features), atol=1e-5, rtol=0)
    torch.testing.assert_close(probs, torch.softmax(logits, -1))
    assert probs.dtype == logits.dtype == torch.float32
    assert probs.max() > 0.2, "the test's head says nothing"
    assert len(guard.classes) == probs.shape[1]
    assert not any(parameter.is_meta or parameter.requires_grad for parameter in guard.parameters())


@pytest.mark.parametrize(("family", "layout"), LAYOUTS)
def test_tensors_without_a_place_are_reported(
    family: str, layout: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As transformers calls them unexpected: a bias that the config's linears do not have; ids were once stored."""
    written = write_checkpoint(family, layout, tmp_path)
    first = next(name for name in opened(written).tensors.names() if name.startswith(("model.vis", "model.visual")))
    part = ".".join(first.split(".")[:2])
    rewrite(written, {f"{part}.embeddings.position_ids": torch.zeros(1, 2, dtype=torch.int64)})
    with caplog.at_level(logging.WARNING):
        build_vision(opened(written), grid_of(written))
        assert not caplog.records
        rewrite(written, {f"{part}.extra.bias": torch.ones(3)})
        build_vision(opened(written), grid_of(written))
    assert f"ignored: 1 tensor (0.0 % of the bytes) beyond what config.json describes: '{part}.extra.bias'" in (
        caplog.records[-1].getMessage()
    )


@pytest.mark.parametrize(("family", "layout"), LAYOUTS)
def test_reads_nothing_of_the_language_model(
    family: str, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even shapes, which would fetch the shard that holds the tensor from the hub."""
    asked: set[str] = set()
    shape = TensorStore.shape

    def recorded(store: TensorStore, name: str) -> tuple[int, ...]:
        asked.add(name)
        return shape(store, name)

    monkeypatch.setattr(TensorStore, "shape", recorded)
    written = write_checkpoint(family, layout, tmp_path)
    checkpoint = opened(written)
    asked.clear()
    build_reference_guard(checkpoint, grid=grid_of(written))
    allowed = (*checkpoint.family.vision_prefixes, "img_safety_head.")
    assert checkpoint.tensors.read_names
    assert all(name.startswith(allowed) for name in checkpoint.tensors.read_names | asked)


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_guard_of_a_checkpoint_without_language_model(family: str, tmp_path: Path) -> None:
    written = write_checkpoint(family, "hf", tmp_path)
    rewrite(written, {}, drop="language_model")
    probs, _ = build_reference_guard(opened(written))(written.images(2))
    torch.testing.assert_close(probs, written.probs(written.features(written.images(2))), atol=1e-5, rtol=0)


def test_half_precision_is_close(tmp_path: Path) -> None:
    written = write_checkpoint("llava", "hf", tmp_path)
    guard = build_reference_guard(opened(written), dtype=torch.bfloat16)
    probs, logits = guard(written.images(2))
    assert guard.head.mlp[0].weight.dtype == torch.bfloat16
    assert logits.dtype == torch.float32
    torch.testing.assert_close(probs, written.probs(written.features(written.images(2))), atol=0.1, rtol=0)


def test_language_model_tap_is_refused(tmp_path: Path) -> None:
    written = write_checkpoint("llava", "original", tmp_path)
    checkpoint = opened(written, "language_model")
    with pytest.raises(GuardHeadError, match=r"python -m calibration\.distill"):
        build_reference_guard(checkpoint)
    images = written.images(1)
    torch.testing.assert_close(build_vision(checkpoint)(images), written.features(images), atol=1e-5, rtol=0)


def test_wrong_shape_is_named(tmp_path: Path) -> None:
    written = write_checkpoint("gemma3", "hf", tmp_path)
    name = "model.vision_tower.encoder.layers.1.mlp.fc2.weight"
    rewrite(written, {name: torch.zeros(64, 95)})
    with pytest.raises(CheckpointError, match=rf"'{name}' has shape \(64, 95\).*\(64, 96\)"):
        build_reference_guard(opened(written))


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    written = write_checkpoint("gemma3", "hf", tmp_path)
    rewrite(written, {}, drop="vision_tower.post_layernorm.bias")
    with pytest.raises(CheckpointError, match=r"lacks 'model\.vision_tower\.post_layernorm\.bias'"):
        build_reference_guard(opened(written))


def test_llava_without_the_layers_it_does_not_read(tmp_path: Path) -> None:
    written = write_checkpoint("llava", "hf", tmp_path)
    rewrite(written, {}, drop="encoder.layers.2.")
    rewrite(written, {}, drop="post_layernorm")
    images = written.images(2)
    guard = build_reference_guard(opened(written))
    torch.testing.assert_close(guard(images)[0], written.probs(written.features(images)), atol=1e-5, rtol=0)
    assert not any(parameter.is_meta for parameter in guard.parameters())


def test_original_llava_counts_layers_of_the_named_tower(tmp_path: Path) -> None:
    """Of a tower said to have 24 layers, -2 is layer 23: a file that holds 3 is incomplete."""
    written = write_checkpoint("llava", "original", tmp_path)
    path = written.folder / "config.json"
    config = json.loads(path.read_text())
    config["vision_config"]["num_hidden_layers"] = 24
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"hold 3 vision layers.*output of 23 of 24"):
        build_reference_guard(opened(written))


@pytest.mark.parametrize(
    ("tower", "message"),
    [
        ("openai/clip-vit-large-patch14-336", r"\(64, .*vision_config.hidden_size = 1024"),
        ("some/clip-tower", "names the unknown vision tower 'some/clip-tower'"),
        (None, r"\(64, .*vision_config.hidden_size = 1024"),
    ],
)
def test_a_tower_that_is_only_named(tower: str | None, message: str, tmp_path: Path) -> None:
    """Its heads are those of the tower of that name, LLaVA's own where none is named, never guessed."""
    written = write_checkpoint("llava", "original", tmp_path)
    path = written.folder / "config.json"
    config = json.loads(path.read_text()) | {"mm_vision_tower": tower}
    del config["vision_config"]
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        build_reference_guard(opened(written))


def test_other_image_sizes(tmp_path: Path) -> None:
    square = build_reference_guard(opened(write_checkpoint("llava", "hf", tmp_path / "llava")))
    with pytest.raises(InputError, match="70x56 pixels; this vision tower reads 56x56"):
        square(torch.zeros(1, 70, 56, 3, dtype=torch.uint8))
    with pytest.raises(InputError, match="N x H x W x 3"):
        square(torch.zeros(1, 3, 56, 56))
    written = write_checkpoint("qwen2_5_vl", "old", tmp_path / "qwen")
    free = build_reference_guard(opened(written), grid=SIZE["qwen2_5_vl"])
    assert free.features(torch.zeros(2, 56, 140, 3, dtype=torch.uint8)).shape == (2, 10, WIDTH)
    with pytest.raises(InputError, match="multiples of 28"):
        free(torch.zeros(1, 70, 56, 3, dtype=torch.uint8))


def test_flatten_patches_equals_the_image_processor(tmp_path: Path) -> None:
    written = write_checkpoint("qwen2_5_vl", "hf", tmp_path)
    images = written.images(2)
    vision = build_vision(opened(written), SIZE["qwen2_5_vl"])
    pixels = torch.from_numpy(vision.preprocessing.normalise(images.numpy()))
    flat = flatten_patches(pixels, patch_size=14, temporal_patch_size=2, merge_size=2)
    torch.testing.assert_close(flat, written.pixels(images)["pixel_values"], atol=1e-6, rtol=1e-6)
