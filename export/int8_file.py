"""Write a guard's float32 file in INT8 with ONNX Runtime's quantizer, unjudged: what :mod:`export.int8` tries.

Shapes: n images, H × W pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from export.rewrites import FUSED
from export.rewrites.int8_weights import store_weights_in_int8

__all__ = ["FLAVOURS", "Flavour", "quantizable", "quantize", "quantize_products"]

Flavour = Literal["int8", "int8-dynamic"]
FLAVOURS: tuple[Flavour, ...] = ("int8", "int8-dynamic")
PRODUCTS = ("MatMul", "Gemm", "Conv")

Bytes = NDArray[np.uint8]


def quantize(source: Path, path: Path, flavour: Flavour, calibration: Bytes, *, head_layers: int) -> None:
    """Write the float32 file ``source`` in INT8, all products but the head's, unjudged."""
    products = quantizable(source, flavour)
    quantize_products(source, path, flavour, calibration, products[:-head_layers], products[-head_layers:])


def quantizable(source: Path, flavour: Flavour) -> list[str]:
    """Return the names of what a flavour can quantize, in their order.

    Products with constant weights and, in the static flavour, the product of queries and keys in attention.
    """
    import onnx

    graph = onnx.load(str(source), load_external_data=False).graph
    constants = {tensor.name for tensor in graph.initializer}
    kinds = PRODUCTS if flavour == "int8" else PRODUCTS[:2]
    fused = (FUSED,) if flavour == "int8" else ()
    return [
        node.name
        for node in graph.node
        if node.op_type in fused or (node.op_type in kinds and len(node.input) > 1 and node.input[1] in constants)
    ]


def quantize_products(
    source: Path, path: Path, flavour: Flavour, calibration: Bytes, chosen: Sequence[str], head: Sequence[str]
) -> None:
    """Quantize the products ``chosen``; of the ``head`` the weights alone: the verdict hangs on its arithmetic."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static

    path.with_name(path.name + ".data").unlink(missing_ok=True)
    common: dict[str, Any] = {
        "op_types_to_quantize": [*PRODUCTS, FUSED],
        "nodes_to_quantize": list(chosen),
        "per_channel": True,
        "weight_type": QuantType.QInt8,
        "use_external_data_format": source.with_name(source.name + ".data").exists(),
    }
    with _quiet():
        if flavour == "int8-dynamic":
            quantize_dynamic(str(source), str(path), extra_options={"MatMulConstBOnly": True}, **common)
            store_weights_in_int8(path, head)
            return
        quantize_static(
            str(source),
            str(path),
            _Reader(calibration),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QInt8,
            extra_options={
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "MatMulConstBOnly": True,
                "QuantizeBias": False,  # accelerators take biases in float
                "OpTypesToExcludeOutputQuantization": [*PRODUCTS, FUSED],
            },
            **common,
        )
    _leave_values_in_float(path)
    store_weights_in_int8(path, head)


def _leave_values_in_float(path: Path) -> None:
    """Take back what the quantizer did to attention's values: what multiplies them, a softmax, has no fixed scale."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    made_by = {output: node for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        source = made_by.get(node.input[2]) if node.op_type == FUSED else None
        if source is not None and source.op_type == "DequantizeLinear":
            node.input[2] = made_by[source.input[0]].input[0]
    for _ in ("dequantizers", "the quantizers before them"):
        read = {name for node in model.graph.node for name in node.input} | {each.name for each in model.graph.output}
        for node in [node for node in model.graph.node if not read & set(node.output)]:
            model.graph.node.remove(node)
    onnx.save(model, str(path))


class _Reader:
    """Gives calibration images to ONNX Runtime's quantizer, one at a time."""

    def __init__(self, images: Bytes) -> None:
        self._images = iter(images)

    def get_next(self) -> dict[str, Bytes] | None:
        image = next(self._images, None)
        return None if image is None else {"rgb": image[np.newaxis]}

    def __iter__(self) -> Iterator[dict[str, Bytes]]:
        return iter(self.__next__, None)

    def __next__(self) -> dict[str, Bytes] | None:
        return self.get_next()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the quantizer's advice about preprocessing, which our exported graphs do not need."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
