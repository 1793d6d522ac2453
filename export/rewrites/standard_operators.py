"""Expand the functions that a model carries, for readers that know standard operators alone.

Preserves every value: the function's body is what its node means. Weights beside the file stay there. Source: the
ONNX IR specification, "Functions"; ``onnx.inliner``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from export.rewrites.streamed_weights import place_beside
from runtimes.guard.cuda import tensorrt_extra
from safevlm.errors import MissingExtraError

if TYPE_CHECKING:
    from onnx import NodeProto

__all__ = ["to_standard"]


def to_standard(source: Path, target: Path) -> None:
    """Write the graph of ``source`` to ``target`` without functions; weights beside it are given to it, too.

    Raises MissingExtraError without the package onnx.
    """
    try:
        import onnx
        from onnx import inliner
    except ImportError as error:
        raise MissingExtraError("onnx", tensorrt_extra(), "expanding a guard's functions") from error
    model = onnx.load(str(source), load_external_data=False)
    model = inliner.inline_local_functions(model)
    standard = [opset for opset in model.opset_import if opset.domain in ("", "ai.onnx")]
    del model.opset_import[:]
    model.opset_import.extend(standard)
    for node in model.graph.node:
        _as_tensor(node)
    data = source.with_name(source.name + ".data")
    if data.exists():
        place_beside(data, target.with_name(data.name))
    onnx.save(model, str(target))


def _as_tensor(node: NodeProto) -> None:
    """Write the number of a Constant as a tensor, the form that every parser reads."""
    from onnx import TensorProto, helper

    kinds = {"value_int": TensorProto.INT64, "value_float": TensorProto.FLOAT}
    for attribute in [each for each in node.attribute if node.op_type == "Constant" and each.name in kinds]:
        number = attribute.i if attribute.name == "value_int" else attribute.f
        tensor = helper.make_tensor(node.output[0], kinds[attribute.name], [], [number])
        node.attribute.remove(attribute)
        node.attribute.append(helper.make_attribute("value", tensor))
