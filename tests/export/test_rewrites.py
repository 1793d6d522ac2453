"""Each rewrite of the graph preserves what its docstring says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from export.graph import build_graph
from export.rewrites.linear_after_mean import fold_linear
from export.rewrites.unread_layers import layers_read
from models.checkpoint import open_checkpoint
from models.errors import CheckpointError
from models.fixed_windows import FixedWindowTower
from models.qwen_grid import flatten_patches, grid_thw
from models.reference import build_reference_guard, build_vision
from tests.models.random_checkpoints import LAYOUTS, SIZE, write_checkpoint

FAMILIES = [layout for layout in LAYOUTS if layout[1] in ("hf", "original")]


@pytest.mark.parametrize("bias", [True, False])
def test_a_folded_linear_is_both_maps_after_the_mean(bias: bool) -> None:
    torch.manual_seed(0)
    inner, outer = nn.Linear(24, 16, bias=bias), nn.Linear(16, 8)
    tokens = torch.randn(3, 11, 24)
    folded = fold_linear(inner.weight, inner.bias, outer)
    torch.testing.assert_close(folded(tokens.mean(1)), outer(inner(tokens).mean(1)), atol=1e-6, rtol=0)
    assert folded.weight.shape == (8, 24)


def test_a_folded_linear_is_computed_in_double() -> None:
    """Terms that cancel only in double precision still cancel after folding."""
    outer = nn.Linear(2, 1, bias=False)
    outer.weight = nn.Parameter(torch.tensor([[1.0, -1.0]]))
    inner = torch.tensor([[1e4 + 1], [1e4]])
    assert fold_linear(inner, None, outer).weight.item() == 1.0


@pytest.mark.parametrize(("hidden_state", "layers"), [(-1, 24), (-2, 23), (0, 0), (24, 24), (-25, 0)])
def test_layers_read_counts_as_transformers_numbers_hidden_states(hidden_state: int, layers: int) -> None:
    assert layers_read(24, hidden_state) == layers


def test_a_hidden_state_beyond_the_tower_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"hidden state -26, but it has 24 layers: -25 to 24 are allowed"):
        layers_read(24, -26)


@pytest.mark.parametrize("size", [(56, 56), (112, 112), (112, 84), (140, 84), (28, 196)])
def test_fixed_windows_give_the_towers_own_states_in_window_order(size: tuple[int, int], tmp_path: Path) -> None:
    """Equal windows, unequal ones, and an image smaller than a window; the tower's windows are 56 pixels."""
    written = write_checkpoint("qwen2_5_vl", "hf", tmp_path)
    vision = build_vision(open_checkpoint(str(tmp_path)), size)
    tower: Any = vision.tower
    pixels = torch.randn(2, 3, *size)
    patches = flatten_patches(pixels, patch_size=14, temporal_patch_size=2, merge_size=2)
    with torch.no_grad():
        theirs = written.model.model.visual(patches, grid_thw=grid_thw(2, *size, 14)).pooler_output
        states = FixedWindowTower(tower, *size)(pixels)
        ours = tower.merger(states.flatten(0, 1)).unflatten(0, (2, -1))
    in_reading_order = theirs.unflatten(0, (2, -1))
    for image in range(2):
        distance = torch.cdist(ours[image], in_reading_order[image])
        assert distance.min(dim=1).values.max() < 1e-4
        assert sorted(distance.argmin(dim=1).tolist()) == list(range(ours.shape[1])), "a token is lost or doubled"


@pytest.mark.parametrize(("family", "layout"), FAMILIES)
def test_the_graph_equals_the_untouched_guard(family: str, layout: str, tmp_path: Path) -> None:
    written = write_checkpoint(family, layout, tmp_path)
    grid = SIZE[family] if family == "qwen2_5_vl" else None
    guard = build_reference_guard(open_checkpoint(str(tmp_path), tap="projector"), grid=grid)
    images = written.images(3)
    with torch.no_grad():
        probs, logits = guard(images)
        found_probs, found_logits = build_graph(guard)(images)
    torch.testing.assert_close(found_probs, probs, atol=1e-6, rtol=0)
    torch.testing.assert_close(found_logits, logits, atol=1e-4, rtol=0)
    assert probs.max() > 0.2, "twenty equal probabilities would agree with anything"


def test_the_graph_drops_what_the_tap_does_not_read(tmp_path: Path) -> None:
    """LLaVA reads CLIP at layer -2: the last layer, the final norm and linear_2 are not in the graph."""
    write_checkpoint("llava", "original", tmp_path)
    guard = build_reference_guard(open_checkpoint(str(tmp_path), tap="projector"))
    names = {name for name, _ in build_graph(guard).named_parameters()}
    assert not any(part in name for name in names for part in ("layers.2.", "post_layernorm", "linear_2"))
    assert any("layers.1." in name for name in names)
