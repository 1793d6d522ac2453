"""Move the int8 products of a guard's INT8 file onto its float16 file: what TensorRT builds an int8 engine from.

The INT8 file computes in float32 between its products, as CPUs do best; an accelerator would write attention's scores
out in float32. Here weights and scales are the INT8 file's, all else the float16 file's. Queries and keys are left in
float16: quantized, they keep TensorRT from computing attention in one kernel (RTX 1.7.1, one layer of SafeGem's tower,
8 images: 17.8 GB of scratch memory on float32, 8.9 GB on float16, 0.6 GB without them). Preserves inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from export.rewrites.streamed_weights import WeightWriter, read_weight
from runtimes.guard.cuda import tensorrt_extra
from safevlm.errors import MissingExtraError, SafeVLMError

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

__all__ = ["quantize_half"]

HALF = "trunk."
"""Begins the names of weights that a float16 file has in float16, before those of the float32 file."""
SMALLEST = np.float32(2.0**-24)
"""Of float16; a scale of 0 is none."""


@dataclass(frozen=True)
class _Product:
    """What a product reads in the INT8 file: a weight's codes, scale and zero point, and its activation's scale."""

    weight: tuple[str, str, str]
    axis: int
    activation: str | None


def quantize_half(int8: Path, half: Path, target: Path) -> None:
    """Write the float16 file ``half`` to ``target`` with the products that ``int8`` quantizes in int8.

    Raises MissingExtraError without the package onnx, SafeVLMError for files of two guards.
    """
    try:
        import onnx
    except ImportError as error:
        raise MissingExtraError("onnx", tensorrt_extra(), "building an int8 engine") from error
    stated, model = (onnx.load(str(path), load_external_data=False) for path in (int8, half))
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    products = {name if name in weights else HALF + name: each for name, each in _products(stated).items()}
    if missing := sorted(products.keys() - weights.keys()):
        raise SafeVLMError(f"{half.name} has no weight {missing[0]!r}, which {int8.name} quantizes: export both again.")
    codes = {tensor.name: tensor for tensor in stated.graph.initializer}
    with WeightWriter(target, beside=half.with_name(half.name + ".data").exists()) as writer:
        made = _Made(codes, int8.parent, writer)
        nodes = [
            each
            for node in model.graph.node
            for each in made.nodes(node, products, {name: tensor.data_type for name, tensor in weights.items()})
        ]
        read = {name for node in nodes for name in node.input}
        kept = [writer.write(name, read_weight(each, half.parent)) for name, each in weights.items() if name in read]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend([*made.tensors, *kept])
    onnx.save(model, str(target))


def _products(model: ModelProto) -> dict[str, _Product]:
    """Return the quantized products of an INT8 file by their weights' names."""
    made = {output: node for node in model.graph.node for output in node.output}
    found = {}
    for node in model.graph.node:
        weight = made.get(node.input[1]) if node.op_type in ("MatMul", "Gemm", "Conv") else None
        if weight is None or weight.op_type != "DequantizeLinear" or made.get(weight.input[0]) is not None:
            continue
        x = made.get(node.input[0])
        axis = next((each.i for each in weight.attribute if each.name == "axis"), 1)
        scale = x.input[1] if x is not None and x.op_type == "DequantizeLinear" else None
        values, factor, zero = weight.input
        found[node.input[1].removesuffix("_dequantized")] = _Product((values, factor, zero), axis, scale)
    return found


class _Made:
    """The nodes that are added, and the tensors that they read."""

    def __init__(self, codes: Mapping[str, TensorProto], folder: Path, writer: WeightWriter) -> None:
        self.codes, self.folder, self.writer = codes, folder, writer
        self.tensors: list[TensorProto] = []
        self._names: set[str] = set()

    def nodes(self, node: NodeProto, products: Mapping[str, _Product], kinds: Mapping[str, int]) -> Iterator[NodeProto]:
        """Yield what stands for ``node``, in order."""
        from onnx import helper

        weight = node.input[1] if len(node.input) > 1 else ""
        product = products.get(weight) if node.op_type in ("MatMul", "Gemm", "Conv") else None
        if product is None:
            yield node
            return
        kind = helper.tensor_dtype_to_np_dtype(kinds[weight])
        x = node.input[0]
        if product.activation is not None:
            scale = self._scale(product.activation, kind)
            self._tensor(f"{x}_zero", np.array(0, np.int8))
            if self._new(f"{x}_quantized"):
                steps = (("QuantizeLinear", x, "quantized"), ("DequantizeLinear", f"{x}_quantized", "dequantized"))
                for operator, given, what in steps:
                    name = f"{x}_{what}"
                    yield helper.make_node(operator, [given, scale, f"{x}_zero"], [name], name=name)
            node.input[0] = f"{x}_dequantized"
        values, factor, zero = product.weight
        for name in (values, zero):
            self._tensor(name, read_weight(self.codes[name], self.folder))
        read = [values, self._scale(factor, kind), zero]
        node.input[1] = f"{weight}_dequantized"
        if self._new(node.input[1]):
            name = node.input[1]
            yield helper.make_node("DequantizeLinear", read, [name], name=name, axis=product.axis)
        yield node

    def _scale(self, name: str, kind: np.dtype[Any]) -> str:
        """Store a scale in the type of the values that it scales."""
        self._tensor(name, np.maximum(read_weight(self.codes[name], self.folder), SMALLEST).astype(kind))
        return name

    def _tensor(self, name: str, values: NDArray[Any]) -> None:
        if self._new(name):
            self.tensors.append(self.writer.write(name, values))

    def _new(self, name: str) -> bool:
        new = name not in self._names
        self._names.add(name)
        return new
