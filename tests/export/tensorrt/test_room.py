"""The memory that a build is said to need is what NVIDIA's builder says, and batches by default follow it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.tensorrt.room import default_batch, scratch_bytes
from export.tensorrt.targets import set_targets

SAFEGEM, SAFELLAVA = (4096, 1152, 16, 4304), (577, 1024, 16, 4096)
"""Tokens, width, heads and the width within, of one layer of a tower at its real size."""


def write_layer(path: Path, shape: tuple[int, int, int, int], *, half: bool) -> None:
    """Write attention and the two maps behind it, as a guard's graph has them in standard operators."""
    tokens, width, heads, inner = shape
    kind, dtype = (TensorProto.FLOAT16, np.float16) if half else (TensorProto.FLOAT, np.float32)
    weights = {"split": np.array([0, 0, heads, width // heads]), "whole": np.array([0, 0, width])}
    weights |= {each: np.ones((width, width), dtype) for each in ("wq", "wk", "wv", "wo")}
    weights |= {"up": np.ones((width, inner), dtype), "down": np.ones((inner, width), dtype)}
    nodes = []
    for name, order in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
        nodes.append(helper.make_node("MatMul", ["x", f"w{name}"], [name]))
        nodes.append(helper.make_node("Reshape", [name, "split"], [f"{name}_split"]))
        nodes.append(helper.make_node("Transpose", [f"{name}_split"], [f"{name}_heads"], perm=order))
    nodes += [
        helper.make_node("MatMul", ["q_heads", "k_heads"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["shares"], axis=-1),
        helper.make_node("MatMul", ["shares", "v_heads"], ["mixed"]),
        helper.make_node("Transpose", ["mixed"], ["turned"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["turned", "whole"], ["joined"]),
        helper.make_node("MatMul", ["joined", "wo"], ["projected"]),
        helper.make_node("Add", ["x", "projected"], ["middle"]),
        helper.make_node("MatMul", ["middle", "up"], ["wide"]),
        helper.make_node("Gelu", ["wide"], ["bent"], approximate="tanh"),
        helper.make_node("MatMul", ["bent", "down"], ["narrow"]),
        helper.make_node("Add", ["middle", "narrow"], ["y"]),
    ]
    values = [helper.make_tensor_value_info(name, kind, ["N", tokens, width]) for name in ("x", "y")]
    stored = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "layer", values[:1], values[1:], stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)


def said_by_the_builder(path: Path, shape: tuple[int, ...], batch: int) -> int:
    """Return ``Max Scratch Memory`` of the builder's log."""
    trt: Any = pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")
    said: list[str] = []

    class Logger(trt.ILogger):  # type: ignore[misc]  # it has no types
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            said.append(message)

    log = Logger()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    assert parser.parse_from_file(str(path))
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    profile = builder.create_optimization_profile()
    profile.set_shape("x", *((each, *shape[:2]) for each in (1, 1, batch)))
    config.add_optimization_profile(profile)
    set_targets(trt, config, ["sm89"])
    assert builder.build_serialized_network(network, config) is not None
    return max(int(found[1]) for line in said if (found := re.search(r"Max Scratch Memory: (\d+)", line)))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("shape", [SAFEGEM, SAFELLAVA])
def test_the_estimate_is_what_nvidias_builder_says(
    tmp_path: Path, shape: tuple[int, int, int, int], half: bool
) -> None:
    write_layer(tmp_path / "layer.onnx", shape, half=half)
    ours = 8 * scratch_bytes(tmp_path / "layer.onnx", fused=half)
    theirs = said_by_the_builder(tmp_path / "layer.onnx", shape, 8)
    assert 0.8 * theirs <= ours <= 1.5 * theirs, (ours, theirs)


@pytest.mark.parametrize(("scratch", "batch"), [(0, 8), (79 * 2**20, 8), (600 * 2**20, 6), (9 * 2**28, 1), (2**40, 1)])
def test_a_default_batch_is_as_large_as_usual_memory_allows(scratch: int, batch: int) -> None:
    assert default_batch(scratch) == batch
