"""Name the nodes whose values can leave float16's range, for builders that choose precisions themselves.

A weakly typed builder (TensorRT before 10) takes a float32 graph and computes in float16 what is not pinned. Float16
ends at 65,504, and these can be larger in checkpoints that were trained in bfloat16: squares and means, an RMS norm up
to the product that brings its input back to about 1, and, behind a gated activation (SwiGLU), its product, the map
that reads it, and the sums that carry that on from layer to layer. Preserves every value: names alone change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx import NodeProto

__all__ = ["FLOAT32", "name_wide"]

FLOAT32 = "float32/"
"""Begins the names of nodes that a weakly typed builder must leave in float32."""
SQUARES = ("Pow", "ReduceMean", "Sqrt", "Reciprocal")
MAPS = ("MatMul", "Gemm")
CARRIERS = ("Add", "Reshape", "Transpose", "GatherND", "Squeeze", "Unsqueeze")
"""Of a residual stream: what adds to it, and what moves it."""


def name_wide(nodes: Sequence[NodeProto]) -> None:
    """Begin the names of such nodes with :data:`FLOAT32`; ``nodes`` are in topological order."""
    made = {output: node for node in nodes for output in node.output}
    rooted = {node.input[0] for node in nodes if node.op_type == "Sqrt"}
    products: set[str] = set()
    carried: set[str] = set()
    for node in nodes:
        if _is_gated(node, made):
            products.update(node.output)
        elif (node.op_type in MAPS and node.input[0] in products) or (
            node.op_type in CARRIERS and not carried.isdisjoint(node.input)
        ):
            carried.update(node.output)
        elif node.op_type not in SQUARES and not _is_in_norm(node, made, rooted):
            continue
        node.name = FLOAT32 + (node.name or node.output[0])


def _is_in_norm(node: NodeProto, made: Mapping[str, NodeProto], rooted: set[str]) -> bool:
    """Say whether a node adds a norm's epsilon, or multiplies its input by the reciprocal of the root."""
    if node.op_type == "Add":
        return node.output[0] in rooted
    return node.op_type == "Mul" and any(_kind(name, made) == "Reciprocal" for name in node.input)


def _is_gated(node: NodeProto, made: Mapping[str, NodeProto]) -> bool:
    """Say whether a node is silu(a) · b: what SwiGLU's second map reads."""
    if node.op_type != "Mul" or not all(name in made for name in node.input):
        return False
    return any(_is_silu(made[name], made) for name in node.input)


def _is_silu(node: NodeProto, made: Mapping[str, NodeProto]) -> bool:
    """Say whether a node is a · sigmoid(a)."""
    if node.op_type != "Mul":
        return False
    one, other = node.input
    return any(_kind(gate, made) == "Sigmoid" and made[gate].input[0] == x for x, gate in ((one, other), (other, one)))


def _kind(name: str, made: Mapping[str, NodeProto]) -> str:
    return made[name].op_type if name in made else ""
