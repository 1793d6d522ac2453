"""Each rewrite of the graph preserves what its docstring says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from export.guard.graph import build_graph, build_vision_graph
from export.guard.parts import write_onnx
from export.rewrites.linear_after_mean import fold_linear
from export.rewrites.standard_operators import to_standard
from export.rewrites.transposed_weights import turn_weights_round
from export.rewrites.unread_layers import layers_read
from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.errors import CheckpointError
from safevlm.network.fixed_windows import FixedWindowTower
from safevlm.network.qwen_grid import flatten_patches, grid_thw
from safevlm.network.reference import build_reference_guard, build_vision
from tests.safevlm.checkpoint.random_checkpoints import LAYOUTS, SIZE, write_checkpoint

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


# -- attention as one node ------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["llava", "qwen2_5_vl", "gemma3"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A family's vision path as ONNX with its weights beside it, and pictures."""
    folder = tmp_path_factory.mktemp(request.param)
    vision = build_vision(open_checkpoint(str(write_checkpoint(request.param, "hf", folder / "model").folder)))
    size = vision.preprocessing
    rgb = np.random.default_rng(0).integers(0, 256, (3, size.height, size.width, 3), dtype=np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("export.guard.parts.INSIDE", 0)
        write_onnx(build_vision_graph(vision, request.param), rgb[:2], folder / "vision.onnx")
    return folder / "vision.onnx", rgb


def embeddings_of(path: Path, rgb: Any, name: str = "embeddings") -> Any:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run([name], {"rgb": rgb})[0]


def test_attention_is_one_node_for_those_who_know_it_and_standard_for_all_others(written: tuple[Path, Any]) -> None:
    path, rgb = written
    model = onnx.load(str(path), load_external_data=False)
    fused = [node for node in model.graph.node if node.op_type == "MultiHeadAttention"]
    assert fused and not any(node.op_type == "Softmax" for node in model.graph.node)
    folder = path.parent / "standard"
    folder.mkdir()
    to_standard(path, folder / path.name)
    standard = onnx.load(str(folder / path.name), load_external_data=False)
    assert not standard.functions and {node.domain for node in standard.graph.node} == {""}
    assert sum(node.op_type == "Softmax" for node in standard.graph.node) == len(fused)
    assert not any(each.name.startswith("value_") for node in standard.graph.node for each in node.attribute)
    data = f"{path.name}.data"
    assert (folder / data).samefile(path.with_name(data)), "the weights are not copied"
    one, other = embeddings_of(path, rgb), embeddings_of(folder / path.name, rgb)
    assert np.abs(one).max() > 0 and np.abs(one - other).max() <= 1e-5 * np.abs(one).max()


def test_a_graph_without_functions_becomes_itself(tmp_path: Path) -> None:
    path = tmp_path / "sum.onnx"
    tensor = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2])
    node = onnx.helper.make_node("Add", ["x", "x"], ["y"])
    result = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2])
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", [tensor], [result])), str(path))
    to_standard(path, tmp_path / "same.onnx")
    assert onnx.load(str(tmp_path / "same.onnx")).graph == onnx.load(str(path)).graph


# -- weights --------------------------------------------------------------------------------------------


def test_turned_weights_give_the_same_and_take_no_copy() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(24, 16), nn.GELU(), nn.Sequential(nn.Linear(16, 8, bias=False)))
    first = module[0]
    x = torch.randn(3, 5, 24)
    before = module(x)
    turn_weights_round(module)
    torch.testing.assert_close(module(x), before, atol=1e-6, rtol=0)
    assert not any(isinstance(each, nn.Linear) for each in module.modules())
    shapes = [tuple(each.shape) for each in module.parameters()]
    assert shapes == [(24, 16), (16,), (16, 8)] and module[0].bias is first.bias
