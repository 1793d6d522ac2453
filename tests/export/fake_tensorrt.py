"""A stand-in for the module ``tensorrt``: the builder calls of one version, recorded, and no GPU.

Each version has the names that its release has and no others, so that using a removed flag fails as it would on
the device (NVIDIA/TensorRT ``python/src``, branches release/8.6, release/10.3, release/11.1). An engine is a small
file that says what it was built from; ``tensorrt.calls`` is what the builder was asked for. What NVIDIA's own parser
and builder say is tested with TensorRT-RTX, whose builder needs no GPU: see ``tests/export/tensorrt``.
"""

from __future__ import annotations

import enum
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import onnx

CREATION_FLAGS = {
    8: {"EXPLICIT_BATCH": 0, "EXPLICIT_PRECISION": 1},
    10: {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1},
    11: {"STRONGLY_TYPED": 1, "PREFER_AOT_PYTHON_PLUGINS": 2},
}
BUILDER_FLAGS = {
    8: {
        "FP16": 0,
        "INT8": 1,
        "TF32": 7,
        "VERSION_COMPATIBLE": 13,
        "OBEY_PRECISION_CONSTRAINTS": 10,
        "PREFER_PRECISION_CONSTRAINTS": 11,
    },
    10: {
        "FP16": 0,
        "INT8": 1,
        "TF32": 7,
        "VERSION_COMPATIBLE": 13,
        "OBEY_PRECISION_CONSTRAINTS": 10,
        "PREFER_PRECISION_CONSTRAINTS": 11,
    },
    11: {"TF32": 7, "REFIT": 4, "VERSION_COMPATIBLE": 13},
}
OLD_OPSET, OLD_LACKS = 17, "Gelu"
"""The newest opset that the parser of 8.6 reads, and an operator that it does not have."""


class Layer:
    def __init__(self, name: str) -> None:
        self.name = name
        self.precision: object = None
        self.output_types: dict[int, object] = {}

    def get_output(self, index: int) -> Any:
        return SimpleNamespace(dtype="float32")

    def set_output_type(self, index: int, dtype: object) -> None:
        self.output_types[index] = dtype


class Network:
    def __init__(self, flags: int) -> None:
        self.flags = flags
        self.layers: list[Layer] = []
        self.tensors: dict[str, list[Any]] = {"input": [], "output": []}

    @property
    def num_inputs(self) -> int:
        return len(self.tensors["input"])

    def get_input(self, index: int) -> Any:
        return self.tensors["input"][index]

    @property
    def num_outputs(self) -> int:
        return len(self.tensors["output"])

    def get_output(self, index: int) -> Any:
        return self.tensors["output"][index]

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def get_layer(self, index: int) -> Layer:
        return self.layers[index]


class TimingCache:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> bytes:
        return self.content


class ParserError:
    """An error as 8.6 gives it: the node's index and no names."""

    def __init__(self, index: int) -> None:
        self._index = index

    def node(self) -> int:
        return self._index

    def desc(self) -> str:
        return "Plugin not found, are the plugin name,\n version, and namespace correct?"


def _tensor(value: onnx.ValueInfoProto) -> Any:
    kind = value.type.tensor_type
    sides = tuple(side.dim_value if side.HasField("dim_value") else -1 for side in kind.shape.dim)
    return SimpleNamespace(name=value.name, shape=sides, dtype=onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))


def _enumeration(name: str, values: dict[str, int]) -> Any:
    make: Any = enum.IntEnum
    return make(name, values)


def make_tensorrt(version: str, *, refuse: tuple[str, ...] = (), fail: str | None = None) -> Any:
    """Return a ``tensorrt`` of ``version``; 8.6 lacks the operators ``refuse``, and a build fails with ``fail``."""
    major = int(version.split(".")[0])
    trt: Any = ModuleType("tensorrt")
    calls = SimpleNamespace(
        network_flags=None, parsed=None, set_flags=[], cleared_flags=[], pools={}, profiles=[], caches=[], networks=[]
    )
    trt.__version__, trt.calls, trt.float32, trt.nptype = version, calls, "float32", lambda dtype: dtype
    trt.NetworkDefinitionCreationFlag = _enumeration("NetworkDefinitionCreationFlag", CREATION_FLAGS[major])
    trt.BuilderFlag = _enumeration("BuilderFlag", BUILDER_FLAGS[major])
    trt.HardwareCompatibilityLevel = _enumeration("HardwareCompatibilityLevel", {"NONE": 0, "AMPERE_PLUS": 1})
    trt.MemoryPoolType = _enumeration("MemoryPoolType", {"WORKSPACE": 0})

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    class OnnxParser:
        def __init__(self, network: Network, logger: Any) -> None:
            self._network = network
            self._errors: list[Any] = []

        @property
        def num_errors(self) -> int:
            return len(self._errors)

        def get_error(self, index: int) -> Any:
            return self._errors[index]

        def parse_from_file(self, file: str) -> bool:
            model = onnx.load(file, load_external_data=False)
            beside = {entry.value for each in model.graph.initializer for entry in each.external_data[:1]}
            assert all(Path(file).with_name(name).is_file() for name in beside), "weights are missing"
            calls.parsed = Path(file).name
            self._network.tensors = {
                "input": [_tensor(value) for value in model.graph.input],
                "output": [_tensor(value) for value in model.graph.output],
            }
            if major == 8:
                assert model.opset_import[0].version <= OLD_OPSET, "the real parser would misread it, without a word"
                unknown = {OLD_LACKS, *refuse}
                self._errors = [ParserError(i) for i, node in enumerate(model.graph.node) if node.op_type in unknown]
            self._network.layers = [Layer(node.name) for node in model.graph.node]
            return not self._errors

    class Profile:
        def set_shape(self, name: str, least: Any, best: Any, most: Any) -> None:
            calls.profiles.append((name, least, best, most))

    class Config:
        def __init__(self) -> None:
            self._cache: TimingCache | None = None
            self.hardware_compatibility_level = "NONE"

        def set_flag(self, flag: Any) -> None:
            calls.set_flags.append(flag.name)

        def clear_flag(self, flag: Any) -> None:
            calls.cleared_flags.append(flag.name)

        def set_memory_pool_limit(self, pool: Any, size: int) -> None:
            calls.pools[pool.name] = size

        def add_optimization_profile(self, profile: Profile) -> int:
            return 0

        def create_timing_cache(self, content: bytes) -> TimingCache | None:
            return None if content == b"damaged" else TimingCache(content)

        def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
            assert not ignore_mismatch, "timings of another GPU would be believed"
            if cache.content == b"another GPU":
                return False
            calls.caches.append(cache.content)
            self._cache = cache
            return True

        def get_timing_cache(self) -> TimingCache | None:
            if self._cache is not None:
                self._cache.content += b"+timed"
            return self._cache

    class Builder:
        def __init__(self, logger: ILogger) -> None:
            self._logger: Any = logger

        def create_network(self, flags: int = 0) -> Network:
            calls.network_flags = flags
            calls.networks.append(Network(flags))
            return calls.networks[-1]  # type: ignore[no-any-return]

        def create_builder_config(self) -> Config:
            return Config()

        def create_optimization_profile(self) -> Profile:
            return Profile()

        def build_serialized_network(self, network: Network, config: Config) -> bytes | None:
            calls.level = config.hardware_compatibility_level
            if fail is not None:
                self._logger.log(ILogger.ERROR, fail)
                return None
            return json.dumps({"built": version, "parsed": calls.parsed}).encode()

    trt.ILogger, trt.OnnxParser, trt.Builder = ILogger, OnnxParser, Builder
    return trt
