"""Write a guard's float32 file in INT8, unjudged: what :mod:`export.guard.int8` tries.

Symmetric int8 on both sides: weights have a scale for each output, activations one for each tensor. Weights are read
and written one at a time, so that memory does not grow with the guard. Source: ONNX operator specifications
QuantizeLinear, DequantizeLinear, DynamicQuantizeLinear and MatMulInteger.

Shapes: n images, H × W pixels, I inputs and O outputs of a product.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from export.rewrites import FUSED
from export.rewrites.streamed_weights import WeightWriter, read_weight
from safevlm.errors import PrecisionError

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto, TensorProto

__all__ = ["FLAVOURS", "Flavour", "Pictures", "activation_ranges", "quantizable", "quantize", "write_int8"]

Flavour = Literal["int8", "int8-dynamic"]
FLAVOURS: tuple[Flavour, ...] = ("int8", "int8-dynamic")
PRODUCTS = ("MatMul", "Gemm", "Conv")
LARGEST = 127
WORTH = 2**12
"""Weights of the head with fewer values stay as they are."""


class Pictures(Protocol):
    """Pictures in an array, uint8 n × H × W × 3, or made when a slice of them is asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, which: slice, /) -> NDArray[np.uint8]: ...


def quantize(source: Path, path: Path, flavour: Flavour, calibration: Pictures, *, head_layers: int) -> None:
    """Write the float32 file ``source`` in INT8, all products but the head's, unjudged."""
    products = quantizable(source, flavour)
    ranges = activation_ranges(source, calibration) if flavour == "int8" else {}
    write_int8(source, path, flavour, ranges, products[:-head_layers], products[-head_layers:])


def quantizable(source: Path, flavour: Flavour) -> list[str]:
    """Return the names of what a flavour can quantize, and of the head's maps behind them, in their order.

    Products with constant weights and, in the static flavour, the product of queries and keys in attention.
    """
    import onnx

    return _quantizable(onnx.load(str(source), load_external_data=False).graph, flavour)


def _quantizable(graph: GraphProto, flavour: Flavour) -> list[str]:
    constants = {tensor.name for tensor in graph.initializer}
    kinds = PRODUCTS if flavour == "int8" else PRODUCTS[:2]
    fused = (FUSED,) if flavour == "int8" else ()
    return [
        node.name
        for node in graph.node
        if node.op_type in fused or (node.op_type in kinds and len(node.input) > 1 and node.input[1] in constants)
    ]


def activation_ranges(source: Path, calibration: Pictures) -> dict[str, float]:
    """Return the largest absolute value that each input of a product took on ``calibration``."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    model = onnx.load(str(source), load_external_data=False)
    wanted = set(_quantizable(model.graph, "int8"))
    names = {name for node in model.graph.node if node.name in wanted for name in _activations(node)}
    watched, nodes = [], []
    for node in model.graph.node:
        nodes.append(node)
        for name in [name for name in node.output if name in names]:
            for kind in ("ReduceMin", "ReduceMax"):  # at once, while the activation is there
                watched.append(f"{name}_{kind}")
                nodes.append(helper.make_node(kind, [name], watched[-1:], keepdims=0))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, []) for name in watched)
    path = source.with_name(f".{source.name}.ranges.onnx")  # weights beside a graph are looked for in its folder
    try:
        onnx.save(model, str(path))
        options = onnxruntime.SessionOptions()
        # else every reduction comes last, and holds its activation until then
        options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        runs = [session.run(watched, {"rgb": calibration[i : i + 1]}) for i in range(len(calibration))]
    finally:
        path.unlink(missing_ok=True)
    largest: NDArray[np.float32] = np.abs(np.array(runs, np.float32)).max(axis=0).reshape(-1, 2).max(axis=1)
    if not np.isfinite(largest).all():
        name = watched[2 * int((~np.isfinite(largest)).argmax())].rpartition("_")[0]
        raise PrecisionError(f"activation '{name}' is NaN or infinite for an image, so no scale can be computed.")
    return {name.rpartition("_")[0]: float(value) for name, value in zip(watched[::2], largest, strict=True)}


def write_int8(
    source: Path,
    path: Path,
    flavour: Flavour,
    ranges: Mapping[str, float],
    chosen: Collection[str],
    head: Collection[str],
) -> None:
    """Quantize the products ``chosen``; of the ``head`` the weights alone: the verdict hangs on its arithmetic.

    ``ranges`` are those of :func:`activation_ranges`; the dynamic flavour needs none.
    """
    import onnx

    model = onnx.load(str(source), load_external_data=False)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    with WeightWriter(path, beside=source.with_name(source.name + ".data").exists()) as writer:
        change = _Change(stored, source.parent, writer, ranges, dynamic=flavour == "int8-dynamic")
        nodes = [each for node in model.graph.node for each in change.nodes(node, chosen, head)]
        read = {name for node in nodes for name in node.input}
        kept = [
            writer.write(name, read_weight(tensor, source.parent)) for name, tensor in stored.items() if name in read
        ]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend([*change.made, *kept])
    onnx.save(model, str(path))


class _Change:
    """Makes the INT8 nodes of products, and the tensors that they read: ``made``."""

    def __init__(
        self,
        stored: Mapping[str, TensorProto],
        folder: Path,
        writer: WeightWriter,
        ranges: Mapping[str, float],
        *,
        dynamic: bool,
    ) -> None:
        self.stored, self.folder, self.writer, self.ranges, self.dynamic = stored, folder, writer, ranges, dynamic
        self.made: list[TensorProto] = []
        self._known: set[str] = set()

    def nodes(self, node: NodeProto, chosen: Collection[str], head: Collection[str]) -> Iterator[NodeProto]:
        """Yield what stands for ``node``, in order."""
        if node.name in chosen and self.dynamic and node.op_type == "MatMul":
            yield from self._integer_product(node)
            return
        if node.name in chosen and not self.dynamic:
            for index, name in enumerate(_activations(node)):
                yield from self._through_int8(name)
                node.input[index] = f"{name}_dequantized"
        if node.op_type != FUSED and (node.name in chosen or (node.name in head and self._worth(node.input[1]))):
            yield from self._weight(node)
        yield node

    def _worth(self, name: str) -> bool:
        return bool(np.prod(self.stored[name].dims) >= WORTH)

    def _through_int8(self, name: str) -> Iterable[NodeProto]:
        """Quantize and dequantize an activation, once for all products that read it."""
        from onnx import helper

        if not self._new(f"{name}_dequantized"):
            return []
        largest = self.ranges[name]
        scale = np.float32(largest / LARGEST if largest > 0 else 1)
        self._add(f"{name}_scale", np.array(scale))
        self._add(f"{name}_zero", np.array(0, np.int8))
        rest = [f"{name}_scale", f"{name}_zero"]
        return [
            helper.make_node("QuantizeLinear", [name, *rest], [f"{name}_quantized"], f"{name}_quantize"),
            helper.make_node(
                "DequantizeLinear", [f"{name}_quantized", *rest], [f"{name}_dequantized"], f"{name}_dequantize"
            ),
        ]

    def _weight(self, node: NodeProto) -> Iterable[NodeProto]:
        """Store a product's weight in INT8 and let ``node`` read it dequantized."""
        from onnx import helper

        name, axis = node.input[1], _output_axis(node)
        node.input[1] = f"{name}_dequantized"
        if not self._new(node.input[1]):
            return []
        parts = self._int8(name, axis)
        return [helper.make_node("DequantizeLinear", parts, [node.input[1]], f"{name}_dequantize", axis=axis)]

    def _int8(self, name: str, axis: int) -> list[str]:
        """Store a weight in INT8 with a scale for each index of ``axis``; return names of values, scale and zero."""
        parts = [f"{name}_int8", f"{name}_scale", f"{name}_zero"]
        if not self._new(parts[0]):
            return parts
        values = read_weight(self.stored[name], self.folder)
        others = tuple(each for each in range(values.ndim) if each != axis)
        scale = np.abs(values).max(axis=others, keepdims=True) / np.float32(LARGEST)
        scale[scale == 0] = 1
        codes = np.rint(values / scale).clip(-LARGEST, LARGEST).astype(np.int8)  # a denormal scale is not exact
        for part, stored in zip(parts, (codes, scale.ravel(), np.zeros(scale.size, np.int8)), strict=True):
            self._add(part, stored)
        return parts

    def _integer_product(self, node: NodeProto) -> Iterator[NodeProto]:
        """Yield a MatMul in integers whose activation scale is found as it runs, as ONNX Runtime fuses it."""
        from onnx import TensorProto, helper

        x, output = node.input[0], node.output[0]
        found = [f"{x}_quantized", f"{x}_found_scale", f"{x}_found_zero"]
        if self._new(found[0]):
            yield helper.make_node("DynamicQuantizeLinear", [x], found, f"{x}_quantize")
        weight, scale, zero = self._int8(node.input[1], _output_axis(node))
        integers, floats, factor = (f"{output}_{what}" for what in ("integers", "floats", "scale"))
        yield helper.make_node("MatMulInteger", [found[0], weight, found[2], zero], [integers], integers)
        yield helper.make_node("Cast", [integers], [floats], floats, to=TensorProto.FLOAT)
        yield helper.make_node("Mul", [found[1], scale], [factor], factor)
        yield helper.make_node("Mul", [floats, factor], [output], node.name)

    def _new(self, name: str) -> bool:
        """Say whether a name is asked for the first time, and so is to be made."""
        new = name not in self._known
        self._known.add(name)
        return new

    def _add(self, name: str, values: NDArray[Any]) -> None:
        self.made.append(self.writer.write(name, values))


def _activations(node: NodeProto) -> Sequence[str]:
    """Return what a product reads quantized: not attention's values, whose weights, a softmax, have no fixed scale."""
    return list(node.input[:2]) if node.op_type == FUSED else [node.input[0]]


def _output_axis(node: NodeProto) -> int:
    turned = any(each.name == "transB" and each.i for each in node.attribute)
    return 0 if node.op_type == "Conv" or turned else 1
