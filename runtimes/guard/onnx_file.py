"""What an ONNX file says of its inputs, outputs and weights, read without the onnx package or a runtime.

Just enough of the protobuf wire format (https://protobuf.dev/programming-guides/encoding) and of ``onnx.proto3`` to
know, before a runtime opens the file, what it would load and run. Every occurrence of a field counts, whichever of
them a runtime would take; weights are skipped, not read.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safevlm.errors import BundleError
from safevlm.files.regular_file import open_regular
from safevlm.terminal.printable import shortened

__all__ = ["OnnxFacts", "OnnxTensor", "read_onnx"]

MAX_FIELDS = 1_000_000
"""Fields of a file that are looked at; an export of a vision tower has less than a tenth."""
MAX_DEPTH = 50
MAX_TEXT = 4_096

CHILDREN: Mapping[str, Mapping[int, str]] = {
    "ModelProto": {7: "GraphProto", 8: "OperatorSetIdProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "GraphProto": {
        1: "NodeProto", 5: "TensorProto", 11: "ValueInfoProto", 12: "ValueInfoProto", 15: "SparseTensorProto",
    },
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto", 6: "GraphProto", 10: "TensorProto", 11: "GraphProto", 22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
    "TensorProto": {13: "StringStringEntryProto"},
    "ValueInfoProto": {2: "TypeProto"},
    "TypeProto": {1: "TypeProto.Tensor"},
    "TypeProto.Tensor": {2: "TensorShapeProto"},
    "TensorShapeProto": {1: "TensorShapeProto.Dimension"},
}  # fmt: skip
"""Fields that are messages, by number, of every message that leads to a tensor, a node or a shape."""
TEXTS: Mapping[str, Mapping[int, str]] = {
    "OperatorSetIdProto": {1: "domain"},
    "FunctionProto": {10: "domain"},
    "NodeProto": {4: "op_type", 7: "domain"},
    "TensorProto": {8: "name"},
    "StringStringEntryProto": {1: "key", 2: "value"},
    "ValueInfoProto": {1: "name"},
}
NUMBERS: Mapping[str, Mapping[int, str]] = {
    "ModelProto": {1: "ir_version"},
    "TensorProto": {14: "data_location"},
    "TypeProto.Tensor": {1: "elem_type"},
    "TensorShapeProto.Dimension": {1: "dim_value"},
}
DTYPES = {
    1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 9: "bool", 10: "float16",
    11: "float64", 12: "uint32", 13: "uint64", 16: "bfloat16",
}  # fmt: skip
"""numpy's names of TensorProto.DataType."""


@dataclass(frozen=True)
class OnnxTensor:
    """An input or output of the graph; a side that is not fixed is None."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class OnnxFacts:
    """``external`` are the places that weights are said to lie at, relative to the file's folder.

    ``domains`` are those of operators that no function of the file defines, ``operators`` all of their names.
    """

    ir_version: int
    inputs: tuple[OnnxTensor, ...]
    outputs: tuple[OnnxTensor, ...]
    external: frozenset[str]
    domains: frozenset[str]
    operators: frozenset[str]


def read_onnx(path: Path) -> OnnxFacts:
    """Read an ONNX file. Raises BundleError for one that cannot be read, is damaged or beyond what is allowed."""
    try:
        with open_regular(path) as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _Reader(content).facts()
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise BundleError(f"{path} is not a readable ONNX file: {error}. Export the bundle again.") from error


@dataclass
class _Message:
    """What was found in one message: the texts and numbers that are asked for, and its messages by field."""

    texts: dict[str, str] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)
    inner: dict[int, list[_Message]] = field(default_factory=dict)


class _Reader:
    def __init__(self, content: mmap.mmap) -> None:
        self.content = content
        self.left = MAX_FIELDS
        self.external: set[str] = set()
        self.used: set[str] = set()
        self.operators: set[str] = set()

    def facts(self) -> OnnxFacts:
        model = self._message("ModelProto", 0, len(self.content), 0)
        graphs = model.inner.get(7, [])
        if len(graphs) != 1:
            raise ValueError(f"it holds {len(graphs)} graphs")
        weights = {tensor.texts.get("name", "") for tensor in graphs[0].inner.get(5, [])}
        inputs = [_tensor(value) for value in graphs[0].inner.get(11, [])]
        return OnnxFacts(
            ir_version=model.numbers.get("ir_version", 0),
            inputs=tuple(tensor for tensor in inputs if tensor.name not in weights),
            outputs=tuple(map(_tensor, graphs[0].inner.get(12, []))),
            external=frozenset(self.external),
            domains=frozenset(self.used - {function.texts.get("domain", "") for function in model.inner.get(25, [])}),
            operators=frozenset(self.operators),
        )

    def _message(self, kind: str, start: int, end: int, depth: int) -> _Message:
        """Read one message; what lies deep in a graph is collected, not kept."""
        if depth > MAX_DEPTH:
            raise ValueError(f"messages are nested more than {MAX_DEPTH} deep")
        found = _Message()
        children, texts, numbers = (table.get(kind, {}) for table in (CHILDREN, TEXTS, NUMBERS))
        for number, wire, value, size in self._fields(start, end):
            if wire == 2 and number in children:
                inner = self._message(children[number], value, value + size, depth + 1)
                if children[number] not in ("NodeProto", "AttributeProto"):
                    found.inner.setdefault(number, []).append(inner)
            elif wire == 2 and number in texts:
                found.texts[texts[number]] = self._text(value, size)
            elif wire == 0 and number in numbers:
                found.numbers[numbers[number]] = value
        if kind == "TensorProto":
            self._weight(found)
        elif kind == "NodeProto":
            self.used.add(found.texts.get("domain", ""))
            self.operators.add(found.texts.get("op_type", ""))
        return found

    def _weight(self, tensor: _Message) -> None:
        entries = tensor.inner.pop(13, [])
        if entries or tensor.numbers.get("data_location"):
            places = [entry.texts.get("value", "") for entry in entries if entry.texts.get("key") == "location"]
            self.external.update(places or [""])

    def _text(self, start: int, size: int) -> str:
        if size > MAX_TEXT:
            raise ValueError(f"a name of {size:,} bytes, {MAX_TEXT:,} are allowed")
        try:
            return self.content[start : start + size].decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError("a name is not UTF-8 text") from None

    def _fields(self, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield number, wire type, and the value of a number or the place and size of bytes."""
        while at < end:
            self.left -= 1
            if self.left < 0:
                raise ValueError(f"it has more than {MAX_FIELDS:,} fields")
            key, at = self._varint(at, end)
            number, wire = key >> 3, key & 7
            value, size = at, 0
            if wire == 0:
                value, at = self._varint(at, end)
            elif wire == 2:
                size, value = self._varint(at, end)
                at = value + size
            elif wire in (1, 5):
                at += 8 if wire == 1 else 4
            else:
                raise ValueError(f"field {number} is of the unknown wire type {wire}")
            if at > end or number == 0:
                raise ValueError("a field reaches beyond its message: the file is damaged or cut short")
            yield number, wire, value, size

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        value = 0
        for shift in range(0, 70, 7):
            if at >= end:
                break
            byte = self.content[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, at
        raise ValueError("a number does not end: the file is damaged or cut short")


def _tensor(value: _Message) -> OnnxTensor:
    kinds = [tensor for kind in value.inner.get(2, []) for tensor in kind.inner.get(1, [])]
    shapes = [shape for kind in kinds for shape in kind.inner.get(2, [])]
    if len(kinds) != 1 or len(shapes) != 1:
        raise ValueError(f"'{shortened(value.texts.get('name', ''))}' is not a tensor of a stated shape")
    elem_type = kinds[0].numbers.get("elem_type", 0)
    sides = [side.numbers.get("dim_value") for side in shapes[0].inner.get(1, [])]
    return OnnxTensor(value.texts.get("name", ""), DTYPES.get(elem_type, f"type {elem_type}"), tuple(sides))
