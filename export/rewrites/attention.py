"""Write attention as one node, ``com.microsoft.MultiHeadAttention``, that every reader of ONNX can run.

ONNX Runtime has a kernel for the node that never writes out the heads × T × T scores: at SafeGem's 4,096 patches they
are 1 GiB an image and layer. The model carries a function of the same name whose body is standard operators; a reader
that does not know the node expands that (ONNX IR, "Functions"), and :func:`export.rewrites.standard_operators`
does so for TensorRT. Preserves attention without a mask up to rounding.

Shapes: N images, T tokens, h heads, d head width, E = h·d.
Source: ONNX Runtime ``docs/ContribOperators.md``, com.microsoft.MultiHeadAttention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from onnx import AttributeProto, FunctionProto, NodeProto, TensorProto, defs, helper
from onnxscript import values
from onnxscript.onnx_opset import opset20 as op

from export.rewrites import DOMAIN, FUSED

__all__ = ["add_attention_function", "attention_translations"]

TENSORS = ["tensor(float)", "tensor(float16)"]


def attention_translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return what ``torch.onnx.export`` takes as ``custom_translation_table``."""
    return {torch.ops.aten.scaled_dot_product_attention.default: _attention}


def add_attention_function(model: ir.Model, opset: int, *, half: bool) -> None:
    """Give ``model`` the function of its attention nodes, if it has any; with ``half`` they are of float16."""
    if any(node.domain == DOMAIN and node.op_type == FUSED for node in model.graph):
        function = ir.serde.deserialize_function(_function(opset, TensorProto.FLOAT16 if half else TensorProto.FLOAT))
        model.functions[function.identifier()] = function
        model.opset_imports[DOMAIN] = 1


def _attention(
    query_NhTd: Any,
    key_NhTd: Any,
    value_NhTd: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Say ``aten.scaled_dot_product_attention`` in ONNX; its result is N × h × T × d."""
    assert attn_mask is None and dropout_p == 0 and not is_causal and not enable_gqa, "a vision tower has none of these"
    heads, width = int(query_NhTd.shape[1]), int(query_NhTd.shape[3])
    together: Any = op.Constant(value_ints=[0, 0, -1])
    by_head: Any = op.Constant(value_ints=[0, 0, heads, width])
    queries, keys, values_ = (
        op.Reshape(op.Transpose(each, perm=[0, 2, 1, 3]), together) for each in (query_NhTd, key_NhTd, value_NhTd)
    )
    mixed = _fused(queries, keys, values_, num_heads=heads, scale=width**-0.5 if scale is None else scale)
    split = op.Reshape(mixed, by_head)
    return op.Transpose(split, perm=[0, 2, 1, 3])


def _function(opset: int, dtype: int) -> FunctionProto:
    """Return the node's meaning in standard operators: query, key, value N × T × E to N × T × E."""
    split, scaled = [], []
    for name, order in (("query", [0, 2, 1, 3]), ("key", [0, 2, 3, 1]), ("value", [0, 2, 1, 3])):
        split.append(helper.make_node("Reshape", [name, "by_head"], [f"{name}_NThd"]))
        scaled.append(helper.make_node("Transpose", [f"{name}_NThd"], [f"{name}_heads"], perm=order))
    nodes = [
        _of_attribute("num_heads", "value_int", AttributeProto.INT),
        _of_attribute("scale", "value_float", AttributeProto.FLOAT),
        _integers("first", [0]),
        helper.make_node("Unsqueeze", ["num_heads", "first"], ["heads"]),
        _integers("as_they_are", [0, 0]),
        _integers("rest", [-1]),
        helper.make_node("Concat", ["as_they_are", "heads", "rest"], ["by_head"], axis=0),
        helper.make_node("Concat", ["as_they_are", "rest"], ["together"], axis=0),
        *split,
        *scaled,
        helper.make_node("Cast", ["scale"], ["scale_of_type"], to=dtype),
        helper.make_node("Mul", ["query_heads", "scale_of_type"], ["query_scaled"]),
        helper.make_node("MatMul", ["query_scaled", "key_heads"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["weights"], axis=-1),
        helper.make_node("MatMul", ["weights", "value_heads"], ["mixed_heads"]),
        helper.make_node("Transpose", ["mixed_heads"], ["mixed_NThd"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["mixed_NThd", "together"], ["output"]),
    ]
    return helper.make_function(
        DOMAIN,
        FUSED,
        ["query", "key", "value"],
        ["output"],
        nodes,
        [helper.make_opsetid("", opset)],
        attributes=["num_heads", "scale"],
    )


def _schema() -> defs.OpSchema:
    """Return what of the node's signature is used here."""
    return defs.OpSchema(
        FUSED,
        DOMAIN,
        1,
        inputs=[defs.OpSchema.FormalParameter(name, "T") for name in ("query", "key", "value")],
        outputs=[defs.OpSchema.FormalParameter("output", "T")],
        type_constraints=[("T", TENSORS, "float or float16")],
        attributes=[
            defs.OpSchema.Attribute("num_heads", defs.OpSchema.AttrType.INT, required=True),
            defs.OpSchema.Attribute("scale", defs.OpSchema.AttrType.FLOAT, required=True),
        ],
    )


_fused = values.Op(values.Opset(DOMAIN, 1), FUSED, _schema())


def _of_attribute(name: str, kind: str, type_: Any) -> NodeProto:
    """Return a constant that the node's attribute of that name gives."""
    node = helper.make_node("Constant", [], [name])
    reference = node.attribute.add()
    reference.name, reference.ref_attr_name, reference.type = kind, name, type_
    return node


def _integers(name: str, numbers: list[int]) -> NodeProto:
    value = helper.make_tensor(name, TensorProto.INT64, [len(numbers)], numbers)
    return helper.make_node("Constant", [], [name], value=value)
