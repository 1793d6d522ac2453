"""Random guards at real shapes: the six are as published, and run on the reference path and the exported graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.shapes.random_guard import build_random_guard
from benchmarks.shapes.shapes import VisionShape, find_shape, shape_names
from benchmarks.speed.peer import random_images
from export.guard.graph import build_graph
from safevlm.checkpoint.hub import KNOWN_CHECKPOINTS

VIT = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 1, "patch_size": 14}
QWEN = {"hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "window_size": 56, "fullatt_block_indexes": [1, 7]}
SMALL: dict[str, dict[str, Any]] = {
    "llava": {**VIT, "image_size": 336},
    "gemma3": {**VIT, "image_size": 896, "vision_use_head": False},
    "qwen2_5_vl": {**QWEN, "patch_size": 14},
}


def small_shape(family: str) -> VisionShape:
    """Return a shape of a family with its real image size and a narrow tower."""
    return VisionShape(
        name="small",
        family=family,
        tower="narrow",
        hidden_size=128,
        layers_read=2,
        layers_behind_tap=int(family == "llava"),
        config=SMALL[family],
    )


@pytest.mark.parametrize("family", SMALL)
def test_random_guard_runs_on_the_same_graph(family: str) -> None:
    guard = build_random_guard(small_shape(family), seed=3)
    drawn = dict(guard.state_dict())  # the export graph rearranges the guard's weights
    images = torch.from_numpy(random_images(guard.preprocessing, 2, seed=1))
    with torch.inference_mode():
        probs, logits = guard(images)
        graph, _ = build_graph(guard)(images)
    assert torch.isfinite(logits).all()
    assert probs.std(dim=1).min() > 1e-4, "twenty equal probabilities would hide a difference"
    torch.testing.assert_close(graph, probs, atol=1e-5, rtol=0)
    again, other = (build_random_guard(small_shape(family), seed=seed).state_dict() for seed in (3, 4))
    assert all(torch.equal(tensor, again[name]) for name, tensor in drawn.items())
    assert not all(torch.equal(tensor, again[name]) for name, tensor in other.items())


def test_shapes_are_the_six_checkpoints() -> None:
    assert sorted(shape_names()) == sorted(KNOWN_CHECKPOINTS)
    read = {shape.name: (shape.layers_read, shape.layers) for shape in map(find_shape, shape_names())}
    assert read["SafeLLaVA-13B"] == (23, 24), "LLaVA reads layer -2"
    assert read["SafeGem-27B"] == (27, 27) and read["SafeQwen2.5-VL-7B"] == (32, 32)
    assert find_shape("SafeLLaVA-7B").shortened(2).layers == 3
    assert find_shape("SafeQwen2.5-VL-7B").head_widths == (3584, 1792, 20)
