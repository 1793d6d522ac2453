"""Rewrite a float32 guard graph from opset 20 to 17, the newest that TensorRT 8.6 and 9 read.

Preserved: inputs, outputs, weights (those beside the file stay there) and every value up to rounding.
Changed: ``Gelu`` (opset 20) becomes Erf or Tanh arithmetic; ``ReduceMean`` and its like get their axes as an attribute
again, because the 8.6 parser ignores the input that opset 18 made of them and would average over everything; ``Split``
loses ``num_outputs``; ``Shape`` of some sides becomes that of all and a ``Slice``, because the parsers of 8.6 and 9
ignore ``start`` and ``end``. Nodes whose values can leave float16's range are named
(:mod:`export.rewrites.wide_values`).
Sources: onnx/onnx-tensorrt 8.6-GA and 9.3 ``docs/operators.md``, ``builtin_op_importers.cpp`` and
``onnx2trt_utils.cpp`` (``reduceTensor``); ONNX ``docs/Changelog.md``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.rewrites.streamed_weights import place_beside
from export.rewrites.wide_values import name_wide
from runtimes.guard.cuda import tensorrt_extra
from safevlm.errors import MissingExtraError, SafeVLMError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from onnx import NodeProto

__all__ = ["OPSET", "lower_to_opset17"]

OPSET = 17
IR_VERSION = 8
REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
"""All but the sum's, whose axes were an input already."""
ALL_SIDES = 2**31 - 1
"""The end of a slice that ends with the tensor: TensorRT's integers have 32 bits."""

Lowering = Callable[["NodeProto", "_Constants"], Iterator["NodeProto"]]


class _Constants:
    """The constants of a graph: those it has, by name, and those that the rewrite adds."""

    def __init__(self, model: Any, folder: Path) -> None:
        from onnx import numpy_helper

        self._graph, self._folder, self._helper = model.graph, folder, numpy_helper
        self._tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        for node in model.graph.node:
            for attribute in node.attribute if node.op_type == "Constant" else ():
                self._tensors[node.output[0]] = attribute.t

    def integers(self, name: str, node: NodeProto) -> list[int]:
        """Return the values of a constant that ``node`` reads."""
        if name not in self._tensors:
            raise SafeVLMError(
                f"{node.op_type} {node.name!r} computes its {name!r}, which opset {OPSET} needs as a constant. "
                "Build with TensorRT 10 or newer."
            )
        return [int(value) for value in self._helper.to_array(self._tensors[name], str(self._folder)).ravel()]

    def scalar(self, value: float) -> str:
        """Return the name of a float32 scalar in the graph."""
        import numpy as np

        return self._add(f"opset17_{value!r}", np.array(value, dtype=np.float32))

    def integer(self, value: int) -> str:
        """Return the name of a row of one int64 in the graph."""
        import numpy as np

        return self._add(f"opset17_[{value}]", np.array([value], dtype=np.int64))

    def is_bytes(self, name: str) -> bool:
        """Say whether a tensor is an input of the graph with type uint8."""
        from onnx import TensorProto

        inputs = {each.name: each.type.tensor_type.elem_type for each in self._graph.input}
        return inputs.get(name) == TensorProto.UINT8

    def _add(self, name: str, values: NDArray[Any]) -> str:
        if name not in self._tensors:
            self._tensors[name] = self._helper.from_array(values, name)
            self._graph.initializer.append(self._tensors[name])
        return name


def lower_to_opset17(source: Path, target: Path) -> None:
    """Write the graph of ``source`` to ``target`` in opset 17.

    Weights beside ``source`` are given to ``target``, too, without a copy where the disk can do that. Raises
    MissingExtraError without the package onnx, SafeVLMError for a graph that opset 17 cannot say.
    """
    try:
        import onnx
    except ImportError as error:
        raise MissingExtraError("onnx", tensorrt_extra(), "building with TensorRT 8.6 or 9") from error
    model = onnx.load(str(source), load_external_data=False)
    constants = _Constants(model, source.parent)
    nodes = [lowered for node in model.graph.node for lowered in _LOWERINGS.get(node.op_type, _keep)(node, constants)]
    name_wide(nodes)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    read = {name for node in nodes for name in node.input}
    for tensor in [tensor for tensor in model.graph.initializer if tensor.name not in read]:
        model.graph.initializer.remove(tensor)  # axes that are attributes now
    model.ir_version = IR_VERSION
    for opset in model.opset_import:
        if opset.domain in ("", "ai.onnx"):
            opset.version = OPSET
    for data in {_location(tensor) for tensor in model.graph.initializer} - {""}:
        place_beside(source.parent / data, target.with_name(data))
    onnx.save(model, str(target))
    _check(model, source)


def _check(model: Any, source: Path) -> None:
    """Raise SafeVLMError unless every node is one of opset 17. ``model`` is used up.

    Weights in another file are declared as inputs for the checker, which would read them.
    """
    from onnx import checker, helper

    for tensor in [tensor for tensor in model.graph.initializer if _location(tensor)]:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        model.graph.initializer.remove(tensor)
    try:
        checker.check_model(model)
    except checker.ValidationError as error:
        raise SafeVLMError(
            f"{source.name} cannot be written in opset {OPSET}, the newest that TensorRT 8.6 and 9 read: "
            f"{str(error).splitlines()[0]} Build with TensorRT 10 or newer."
        ) from error


def _keep(node: NodeProto, _: _Constants) -> Iterator[NodeProto]:
    yield node


def _reduction(node: NodeProto, constants: _Constants) -> Iterator[NodeProto]:
    """Turn the axes of a reduction from an input into an attribute."""
    from onnx import helper

    if len(node.input) > 1 and node.input[1]:
        axes = constants.integers(node.input[1], node)
        node.attribute.append(helper.make_attribute("axes", axes))
    del node.input[1:]
    _drop_attribute(node, "noop_with_empty_axes")
    yield node


def _split(node: NodeProto, _: _Constants) -> Iterator[NodeProto]:
    """Drop ``num_outputs``, which the number of outputs says already."""
    _drop_attribute(node, "num_outputs")
    yield node


def _shape(node: NodeProto, constants: _Constants) -> Iterator[NodeProto]:
    """Slice what is asked for out of the whole shape; bytes, which have no shape there, become float32 first.

    8.6 lets an input of uint8 be cast and nothing else; a tensor whose shape alone is read costs nothing.
    """
    from onnx import TensorProto, helper

    bounds = {attribute.name: attribute.i for attribute in node.attribute}
    x, y, name = node.input[0], node.output[0], node.name or node.output[0]
    if constants.is_bytes(x):
        yield helper.make_node("Cast", [x], [f"{y}/float"], name=f"{name}/float", to=TensorProto.FLOAT)
        x = f"{y}/float"
    if not bounds:
        yield helper.make_node("Shape", [x], [y], name=name)
        return
    start, end = bounds.get("start", 0), bounds.get("end", ALL_SIDES)
    ends = [constants.integer(start), constants.integer(end), constants.integer(0)]
    yield helper.make_node("Shape", [x], [f"{y}/all"], name=f"{name}/all")
    yield helper.make_node("Slice", [f"{y}/all", *ends], [y], name=name)


def _gelu(node: NodeProto, constants: _Constants) -> Iterator[NodeProto]:
    """Write x/2 · (1 + f), f = erf(x/√2), or tanh(√(2/π) · x · (1 + 0.044715 · x²)) where ``approximate`` says so.

    The second is ordered so that a float16 overflow of x² ends in tanh(±∞) = ±1, the right value.
    """
    from onnx import helper

    x, y, name = node.input[0], node.output[0], node.name or node.output[0]
    tanh = any(attribute.name == "approximate" and attribute.s == b"tanh" for attribute in node.attribute)
    steps: list[tuple[str, list[str], str]] = []
    if tanh:
        steps = [
            ("Mul", [x, x], "squared"),
            ("Mul", ["squared", constants.scalar(0.044715)], "small"),
            ("Add", ["small", constants.scalar(1.0)], "bent"),
            ("Mul", [x, constants.scalar(math.sqrt(2 / math.pi))], "scaled"),
            ("Mul", ["scaled", "bent"], "argument"),
            ("Tanh", ["argument"], "f"),
        ]
    else:
        steps = [("Mul", [x, constants.scalar(math.sqrt(0.5))], "argument"), ("Erf", ["argument"], "f")]
    steps += [
        ("Add", ["f", constants.scalar(1.0)], "gate"),
        ("Mul", [x, constants.scalar(0.5)], "half"),
        ("Mul", ["half", "gate"], y),
    ]
    local = {step[2] for step in steps} - {y}
    for operator, inputs, output in steps:
        names = [f"{y}/{given}" if given in local else given for given in inputs]
        made = f"{y}/{output}" if output in local else output
        yield helper.make_node(operator, names, [made], name=f"{name}/{output}")


_LOWERINGS: dict[str, Lowering] = {
    "Gelu": _gelu,
    "Shape": _shape,
    "Split": _split,
    **{f"Reduce{kind}": _reduction for kind in REDUCTIONS},
}


def _drop_attribute(node: NodeProto, name: str) -> None:
    for attribute in [attribute for attribute in node.attribute if attribute.name == name]:
        node.attribute.remove(attribute)


def _location(tensor: Any) -> str:
    """Return the file that holds a tensor's values, empty where the graph does itself."""
    return next((str(entry.value) for entry in tensor.external_data if entry.key == "location"), "")
