"""Store weights of linear maps as int8 with a scale for each output, and let them compute in float32.

Changes a weight by half a 127th of its output's largest at most. The guard head's first map is a tenth of
SafeLLaVA's INT8 file when it is stored in float32.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np

__all__ = ["store_weights_in_int8"]

WORTH = 2**12
"""Smaller weights stay as they are."""


def store_weights_in_int8(path: Path, names: Collection[str]) -> None:
    """Rewrite the ONNX file at ``path``: constant weights of the MatMul and Gemm nodes called ``names``."""
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(str(path))
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    data = path.with_name(path.name + ".data")
    unpacking = []
    known = {*names, *(f"{name}_MatMul" for name in names)}  # as ONNX Runtime's quantizer calls what a Gemm becomes
    for node in [node for node in model.graph.node if node.name in known]:
        stored = weights.get(node.input[1])
        if stored is None or np.prod(stored.dims) < WORTH:
            continue
        turned = any(each.name == "transB" and each.i for each in node.attribute)
        axis = 0 if turned else 1
        values = numpy_helper.to_array(stored)
        scale = np.abs(values).max(axis=1 - axis, keepdims=True) / 127
        scale[scale == 0] = 1
        name = node.input[1]
        parts = {
            f"{name}_int8": np.clip(np.rint(values / scale), -127, 127).astype(np.int8),
            f"{name}_scale": scale.ravel().astype(np.float32),
            f"{name}_zero": np.zeros(scale.size, np.int8),
        }
        model.graph.initializer.extend(numpy_helper.from_array(value, key) for key, value in parts.items())
        unpacking.append(helper.make_node("DequantizeLinear", list(parts), [f"{name}_float"], axis=axis))
        node.input[1] = f"{name}_float"
    read = {name for node in model.graph.node for name in node.input}
    for tensor in [tensor for tensor in model.graph.initializer if tensor.name in weights and tensor.name not in read]:
        model.graph.initializer.remove(tensor)
    nodes = [*unpacking, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    large = data.exists()
    data.unlink(missing_ok=True)
    onnx.save(model, str(path), save_as_external_data=large, location=data.name)
