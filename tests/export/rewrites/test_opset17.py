"""What TensorRT 8.6 and 9 are given: each family in their operators, within float16 where it is not pinned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, shape_inference

from export.guard.graph import build_graph, build_vision_graph
from export.guard.parts import write_onnx
from export.rewrites.opset17 import lower_to_opset17
from export.rewrites.standard_operators import to_standard
from export.rewrites.wide_values import FLOAT32
from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.network.reference import build_reference_guard, build_vision
from tests.safevlm.checkpoint.random_checkpoints import write_checkpoint

OLD_ATTRIBUTES: dict[str, set[str]] = {
    "Shape": set(),
    "Split": {"axis"},
    "ReduceMean": {"axes", "keepdims"},
    "ReduceMax": {"axes", "keepdims"},
}
"""What the importers of 8.6 and 9 read of operators that have got more since; they pass over the rest in silence."""


def lowered(path: Path) -> Path:
    """Write what the builder gives to 8.6: both rewrites, one after the other in one folder."""
    folder = path.parent / "scratch"
    folder.mkdir()
    to_standard(path, folder / f"standard.{path.name}")
    lower_to_opset17(folder / f"standard.{path.name}", folder / f"opset17.{path.name}")
    return folder / f"opset17.{path.name}"


def random_images(count: int, height: int, width: int) -> Any:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def answers(model: Any, rgb: Any) -> list[Any]:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return list(session.run(None, {"rgb": rgb}))


@pytest.mark.parametrize(("family", "pooling"), [("llava", "mean"), ("qwen2_5_vl", "mean_max_std"), ("gemma3", "mean")])
def test_every_family_is_said_in_old_operators_with_its_weights_beside_it(
    family: str, pooling: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = write_checkpoint(family, "hf", tmp_path / "model")
    guard = build_reference_guard(open_checkpoint(str(written.folder), tap="projector"))
    size = guard.preprocessing
    guard.pooling = pooling
    if pooling != "mean":
        first = guard.head.mlp[0]
        guard.head.mlp[0] = torch.nn.Linear(3 * first.in_features, first.out_features)
    monkeypatch.setattr("export.guard.parts.INSIDE", 0)
    rgb = random_images(3, size.height, size.width)
    write_onnx(build_graph(guard), rgb[:2], tmp_path / "guard.onnx")
    assert (tmp_path / "guard.onnx.data").exists()
    low = lowered(tmp_path / "guard.onnx")
    model = onnx.load(str(low), load_external_data=False)
    for node in model.graph.node:
        given = {each.name for each in node.attribute}
        assert given <= OLD_ATTRIBUTES.get(node.op_type, given), node
        assert not (node.op_type == "Shape" and node.input[0] == "rgb"), "8.6 casts uint8 and does nothing else with it"
        assert not (node.op_type in ("ReduceMean", "ReduceMax") and len(node.input) > 1)
    for found, right in zip(answers(str(low), rgb), answers(str(tmp_path / "guard.onnx"), rgb), strict=True):
        assert np.ptp(right, axis=0).max() > 1e-3
        np.testing.assert_allclose(found, right, atol=1e-5)


@pytest.mark.parametrize("bounds", [{}, {"start": 1}, {"end": 1}, {"start": -2}, {"start": 1, "end": -1}, {"end": 9}])
def test_a_slice_of_the_shape_is_what_start_and_end_ask_for(bounds: dict[str, int], tmp_path: Path) -> None:
    node = helper.make_node("Shape", ["rgb"], ["sides"], name="shape", **bounds)
    graph = helper.make_graph(
        [node],
        "shape",
        [helper.make_tensor_value_info("rgb", TensorProto.UINT8, ["N", 5, 7, 3])],
        [helper.make_tensor_value_info("sides", TensorProto.INT64, [None])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "a.onnx")
    low = lowered(tmp_path / "a.onnx")
    model = onnx.load(str(low))
    assert all(not each.attribute for each in model.graph.node if each.op_type == "Shape")
    rgb = np.zeros((2, 5, 7, 3), np.uint8)
    assert answers(str(low), rgb)[0].tolist() == answers(str(tmp_path / "a.onnx"), rgb)[0].tolist()


# -- float16 where the builder chooses ------------------------------------------------------------------


def at_its_worst(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a float32 graph as a weakly typed builder may run it: what is not pinned reads and writes float16."""
    typed = shape_inference.infer_shapes(model, strict_mode=True)
    known = [*typed.graph.value_info, *typed.graph.input, *typed.graph.output]
    kinds = {each.name: each.type.tensor_type.elem_type for each in known}
    kinds |= {each.name: each.data_type for each in typed.graph.initializer}
    nodes: list[Any] = []

    def rounded(name: str, to: str) -> None:
        nodes.append(helper.make_node("Cast", [name], [f"{to}/float16"], to=TensorProto.FLOAT16))
        nodes.append(helper.make_node("Cast", [f"{to}/float16"], [to], to=TensorProto.FLOAT))

    for at, node in enumerate(typed.graph.node):
        if node.name.startswith(FLOAT32) or node.op_type == "Constant":
            nodes.append(node)
            continue
        for index, name in enumerate(node.input):
            if kinds.get(name) == TensorProto.FLOAT:
                rounded(name, f"{name}/read/{at}/{index}")
                node.input[index] = f"{name}/read/{at}/{index}"
        nodes.append(node)
        for index, name in enumerate(node.output):
            if kinds.get(name) == TensorProto.FLOAT:
                node.output[index] = f"{name}/written"
                rounded(f"{name}/written", name)
    del typed.graph.node[:]
    typed.graph.node.extend(nodes)
    del typed.graph.value_info[:]
    return typed


@pytest.mark.parametrize(("family", "gates"), [("llava", 1), ("gemma3", 1), ("qwen2_5_vl", 1), ("qwen2_5_vl", 300)])
def test_what_is_not_pinned_stays_in_float16s_range(family: str, gates: int, tmp_path: Path) -> None:
    """With gates of 300 Qwen's gated product, the map behind it and the residual stream are beyond 65,504."""
    written = write_checkpoint(family, "hf", tmp_path / "model")
    vision = build_vision(open_checkpoint(str(written.folder)))
    largest = 0.0

    def watch(_: Any, __: Any, output: torch.Tensor) -> None:
        nonlocal largest
        largest = max(largest, float(output.abs().max()))

    for name, each in vision.tower.named_modules():
        if name.endswith(("gate_proj", "up_proj")):
            each.weight.data *= gates
        if name.endswith("down_proj"):
            each.register_forward_hook(watch)
    rgb = random_images(3, vision.preprocessing.height, vision.preprocessing.width)
    vision(torch.from_numpy(rgb))
    assert (largest > 65_504) == (gates > 1), "or this would show nothing"
    write_onnx(build_vision_graph(vision, family), rgb[:2], tmp_path / "vision.onnx")
    right = answers(str(tmp_path / "vision.onnx"), rgb)[0]
    found = answers(at_its_worst(onnx.load(str(lowered(tmp_path / "vision.onnx")))).SerializeToString(), rgb)[0]
    assert np.isfinite(found).all()
    assert np.abs(found - right).max() <= 2e-2 * np.abs(right).max()
